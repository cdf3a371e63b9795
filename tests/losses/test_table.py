"""Every loss against its formula in plain Python, by gradcheck, and at extreme margins."""

import math
from dataclasses import replace
from decimal import Decimal, getcontext
from types import SimpleNamespace

import pytest
import torch

from dpo_fast.losses import LOSSES, LossOptions, Objective, PairLogps, SequenceLogps
from dpo_fast.losses.reference_free import log1mexp

# Those on groups have a file of their own.
HERE = [name for name, spec in LOSSES.items() if not spec.grouped]
each_loss = pytest.mark.parametrize("name", HERE)
UNPAIRED = [name for name in HERE if not LOSSES[name].paired]
PAIRED = [name for name, spec in LOSSES.items() if spec.paired]


def make_pairs(count: int = 5, seed: int = 0) -> PairLogps:
    """fp64; log-ratios of either sign, lengths that differ, every column."""
    g = torch.Generator().manual_seed(seed)
    uniform = lambda low, high: low + (high - low) * torch.rand(count, generator=g).double()  # noqa: E731
    chosen, rejected = uniform(-8, -2.1), uniform(-8, -2.1)
    reference = chosen + uniform(-2, 2), rejected + uniform(-2, 2)
    lengths = torch.arange(1, count + 1).double(), torch.arange(count + 2, 2, -1).double()
    delta, kl = torch.tensor([0.3, 0.7]).double()
    columns = uniform(0, 1), uniform(0, 1)
    return PairLogps(chosen, rejected, *lengths, *reference, *columns, delta, kl)


def options_of(name: str, **changed) -> LossOptions:
    """The options that the loss requires, and the changed ones."""
    needed = dict.fromkeys(LOSSES[name].needs_options, 1e-3)
    return LossOptions(**(needed | changed))


def values(name: str, rows: PairLogps | SequenceLogps, options: LossOptions) -> torch.Tensor:
    split = not LOSSES[name].paired and isinstance(rows, PairLogps)
    return LOSSES[name].function(rows.sequences if split else rows, options)


# The formulas once more, of plain numbers, with logarithms of sigmoids and odds of probabilities.


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def log_sigmoid(x: float) -> float:
    return math.log(sigmoid(x))


def score(ratio: float, o: LossOptions) -> float:
    """The derivative f'(t) of the divergence's f at t = policy / reference."""
    t, power = math.exp(ratio), o.f_alpha_divergence_coef - 1
    if o.f_divergence_type == "alpha_divergence" and power != 0:
        return (t**power - 1) / power
    slopes = {"forward_kl": 1 - 1 / t, "js_divergence": math.log(2 * t / (1 + t))}
    return slopes.get(o.f_divergence_type, math.log(t))


def margin_of(r, o: LossOptions) -> float:
    return score(r.lw - r.rw, o) - score(r.ll - r.rl, o)


def mean_margin_of(r, o: LossOptions) -> float:
    return score(r.lw - r.rw, o) / r.nw - score(r.ll - r.rl, o) / r.nl


def blend(q: float, x: float) -> float:
    """Cross entropy of a label that is right with probability q."""
    return -(q * log_sigmoid(x) + (1 - q) * log_sigmoid(-x))


def exo(x: float, eps: float) -> float:
    model, labels = (sigmoid(x), sigmoid(-x)), (1 - eps, eps)
    return sum(p * math.log(p / q) for p, q in zip(model, labels))


def discopop(x: float, tau: float) -> float:
    part = sigmoid(x / tau)
    return (1 - part) * -log_sigmoid(x) + part * math.exp(-x)


def odds(mean_logp: float) -> float:
    return math.exp(mean_logp) / (1 - math.exp(mean_logp))


def nca(a: float, b: float) -> float:
    return -log_sigmoid(a) - (log_sigmoid(-a) + log_sigmoid(-b)) / 2


FORMULAS = {  # of one pair r and options o
    "sigmoid": lambda r, o: blend(1 - o.label_smoothing, o.beta * margin_of(r, o) - r.m),
    "ipo": lambda r, o: (
        ((mean_margin_of if o.length_average else margin_of)(r, o) - 0.5 / o.beta) ** 2
    ),
    "hinge": lambda r, o: max(0.0, 1 - o.beta * margin_of(r, o) + r.m),
    "robust": lambda r, o: (
        (
            (1 - o.label_smoothing) * blend(1, o.beta * margin_of(r, o) - r.m)
            - o.label_smoothing * blend(0, o.beta * margin_of(r, o) - r.m)
        )
        / (1 - 2 * o.label_smoothing)
    ),
    "exo_pair": lambda r, o: exo(o.beta * margin_of(r, o) - r.m, o.label_smoothing),
    "nca_pair": lambda r, o: nca(o.beta * (r.lw - r.rw), o.beta * (r.ll - r.rl)),
    "bco_pair": lambda r, o: (
        -math.log(
            sigmoid(o.beta * (r.lw - r.rw) - r.delta)
            * (1 - sigmoid(o.beta * (r.ll - r.rl) - r.delta))
        )
    ),
    "sppo_hard": lambda r, o: (
        ((o.beta * (r.lw - r.rw) - 0.5) ** 2 + (o.beta * (r.ll - r.rl) + 0.5) ** 2) / o.beta**2
    ),
    "apo_zero": lambda r, o: 1 - sigmoid(o.beta * (r.lw - r.rw)) + sigmoid(o.beta * (r.ll - r.rl)),
    "apo_down": lambda r, o: (
        sigmoid(o.beta * (r.lw - r.rw)) + 1 - sigmoid(o.beta * (r.lw - r.rw - r.ll + r.rl))
    ),
    "discopop": lambda r, o: discopop(o.beta * margin_of(r, o) - r.m, o.discopop_tau),
    "sigmoid_norm": lambda r, o: blend(1 - o.label_smoothing, o.beta * mean_margin_of(r, o) - r.m),
    "soft": lambda r, o: blend(r.q, o.beta * margin_of(r, o) - r.m),
    "dpop": lambda r, o: blend(
        1 - o.label_smoothing,
        o.beta * (margin_of(r, o) - o.dpop_lambda * max(0.0, r.rw - r.lw)) - r.m,
    ),
    "sft": lambda r, o: -r.lw,
    "simpo": lambda r, o: blend(
        1 - o.label_smoothing, o.beta * (r.lw / r.nw - r.ll / r.nl - o.simpo_gamma / o.beta) - r.m
    ),
    "cpo": lambda r, o: blend(1 - o.label_smoothing, o.beta * (r.lw - r.ll) - r.m),
    "orpo": lambda r, o: o.beta * math.log(1 + odds(r.ll / r.nl) / odds(r.lw / r.nw)),
    "slic": lambda r, o: max(0.0, o.slic_delta - r.lw + r.ll + r.m),
}
SORTED = {  # over the batch: the two columns whose sorted values are compared
    "aot": lambda r: (r.lw - r.ll, r.rw - r.rl),
    "aot_unpaired": lambda r: (r.lw - r.rw, r.ll - r.rl),
}
ONE_BY_ONE = {  # of a log-ratio, whether it is good, and of kl or delta in r
    "kto": lambda r, good, x, o: sigmoid(o.beta * (r.kl - x if good else x - r.kl)),
    "bco": lambda r, good, x, o: math.log(1 + math.exp((r.delta - o.beta * x) * (1, -1)[not good])),
    "apo_zero_unpaired": lambda r, good, x, o: (
        1 - sigmoid(o.beta * x) if good else sigmoid(o.beta * x)
    ),
}


def rows_of(pairs: PairLogps) -> list[SimpleNamespace]:
    """Plain numbers, pair by pair. A column that is not there is 0."""
    names = ("lw", "ll", "nw", "nl", "rw", "rl", "m", "q", "delta", "kl")
    count = len(pairs.chosen)
    columns = [getattr(pairs, field) for field in list(vars(pairs))[: len(names)]]
    columns = [torch.zeros(count) if c is None else c.expand(count) for c in columns]
    return [SimpleNamespace(**dict(zip(names, row))) for row in zip(*(c.tolist() for c in columns))]


def in_plain_python(name: str, pairs: PairLogps, o: LossOptions) -> list[float]:
    rows = rows_of(pairs)
    if name in SORTED:
        left, right = zip(*map(SORTED[name], rows))
        gaps = [x - y for x, y in zip(sorted(left), sorted(right))]
        return [blend(1 - o.label_smoothing, o.beta * gap) for gap in gaps]
    if name in ONE_BY_ONE:
        sides = [(r, good) for r in rows for good in (True, False)]
        weight = {True: o.desirable_weight, False: o.undesirable_weight}
        ratio = lambda r, good: r.lw - r.rw if good else r.ll - r.rl  # noqa: E731
        return [weight[g] * ONE_BY_ONE[name](r, g, ratio(r, g), o) for r, g in sides]
    return [FORMULAS[name](r, o) for r in rows]


CHANGES = {  # values of the options that losses themselves read
    "beta": [0.03, 0.7],
    "label_smoothing": [0.2, 0.45],
    "length_average": [False],
    "f_divergence_type": ["forward_kl", "js_divergence", "alpha_divergence"],
    "f_alpha_divergence_coef": [0.2, 1.0, 2.5],
    "discopop_tau": [0.5, 1.0],
    "simpo_gamma": [0.0, 1.4],
    "cpo_alpha": [0.2],
    "dpop_lambda": [0.0, 3.0],
    "slic_delta": [0.0, 4.0],
    "slic_lambda": [0.7],
    "desirable_weight": [0.7],
    "undesirable_weight": [1.3],
}
COMPANIONS = {  # what an option needs beside it
    "f_alpha_divergence_coef": {"f_divergence_type": "alpha_divergence"},
    "ld_reference": {"ld_alpha": 0.3},
    "weighting_clamp": {"use_weighting": True},
}


def cases(name: str) -> list[LossOptions]:
    """The defaults, each option that the loss uses alone, and the last values of all together."""
    own = {option: CHANGES[option] for option in LOSSES[name].options if option in CHANGES}
    alone = [COMPANIONS.get(option, {}) | {option: v} for option in own for v in own[option]]
    together = {option: choices[-1] for option, choices in own.items()}
    return [options_of(name, **changed) for changed in ({}, *alone, together)]


@each_loss
@pytest.mark.parametrize("columns", [False, True], ids=["plain", "with columns"])
def test_formula(name, columns):
    pairs = make_pairs()
    spec = LOSSES[name]
    margin = pairs.margin if columns and "margin" in spec.columns else None
    pairs = replace(pairs, margin=margin, delta=pairs.delta if columns else None)
    pairs = replace(pairs, kl=pairs.kl if columns else None)
    for options in cases(name):
        got = values(name, pairs, options)
        assert got.dtype == torch.float64
        expected = in_plain_python(name, pairs, options)
        assert got.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12), options


def test_every_loss_has_a_formula_here():
    assert {*FORMULAS, *SORTED, *ONE_BY_ONE} == set(HERE)
    assert set(ONE_BY_ONE) == set(UNPAIRED)
    assert set(SORTED) == {name for name, spec in LOSSES.items() if spec.coupled}


@pytest.mark.parametrize("name", LOSSES)
def test_the_table_tells_everything(name):
    spec = LOSSES[name]
    assert spec.name == name and spec.formula and spec.source and spec.when
    assert set(spec.options) <= set(vars(LossOptions()))
    assert set(spec.needs_columns) <= set(spec.columns) <= {"weight", "margin", "soft_label"}
    assert set(spec.needs_options) <= set(spec.options)
    assert "arXiv" in spec.source


@each_loss
def test_gradcheck(name):
    pairs = make_pairs(seed=1)
    logps = [pairs.chosen, pairs.rejected, pairs.reference_chosen, pairs.reference_rejected]
    inputs = [x.clone().requires_grad_() for x in logps]

    def loss(chosen, rejected, reference_chosen, reference_rejected, options):
        rows = replace(
            pairs,
            chosen=chosen,
            rejected=rejected,
            reference_chosen=reference_chosen,
            reference_rejected=reference_rejected,
        )
        return values(name, rows, options)

    for options in cases(name):
        torch.autograd.gradcheck(loss, (*inputs, options))


@pytest.mark.parametrize("name", UNPAIRED)
def test_unpaired_losses_take_sequences_and_pairs(name):
    """Good and bad in any order give what the split pairs give."""
    pairs, options = make_pairs(), options_of(name, desirable_weight=1.5, undesirable_weight=0.25)
    split = values(name, pairs, options)
    order = torch.tensor([7, 0, 4, 2, 9, 1, 3, 8, 5, 6])
    good = torch.tensor([True, False]).repeat(5)
    logps = torch.stack([pairs.chosen, pairs.rejected], 1).flatten()
    reference = torch.stack([pairs.reference_chosen, pairs.reference_rejected], 1).flatten()
    lengths = torch.stack([pairs.chosen_lengths, pairs.rejected_lengths], 1).flatten()
    apart = [x[order] for x in (logps, lengths, good, reference)]
    got = values(name, SequenceLogps(*apart, kl=pairs.kl, delta=pairs.delta), options)
    assert torch.equal(got, split[order])
    assert not torch.equal(split, values(name, pairs, options_of(name)))


@pytest.mark.parametrize("name", UNPAIRED)
def test_statistics_default_to_0(name):
    pairs = replace(make_pairs(), kl=None, delta=None)
    zero = torch.tensor(0.0)
    at_zero = values(name, replace(pairs, kl=zero, delta=zero), options_of(name))
    assert torch.equal(values(name, pairs, options_of(name)), at_zero)


# By hand.


def pairs_of(lw, ll, rw, rl, nw=1.0, nl=1.0) -> PairLogps:
    make = lambda x: torch.as_tensor(x, dtype=torch.float64).expand(len(lw))  # noqa: E731
    return PairLogps(*map(make, (lw, ll, nw, nl, rw, rl)))


def test_sigmoid_at_margins_0_10_and_20():
    inputs = pairs_of([-0.5, -10, -1], [-0.1, -30, -21], [-0.5, -10.1, -0.1], [-0.1, -20.1, -0.1])
    expected = [-math.log(1 / (1 + math.exp(-x))) for x in (0, 1, 2)]
    assert values("sigmoid", inputs, LossOptions()).tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "value", "slope"),
    [("sigmoid", 0.437488, -0.035434), ("hinge", 0.4, -0.1), ("ipo", 1.0, 2.0)],
)
def test_values_at_margin_6(name, value, slope):
    chosen = torch.tensor([6.0], dtype=torch.float64, requires_grad=True)
    result = values(name, replace(pairs_of([0], [0], [0], [0]), chosen=chosen), LossOptions())
    result.sum().backward()
    assert result.item() == pytest.approx(value, abs=1e-6)
    assert chosen.grad.item() == pytest.approx(slope, abs=1e-6)


AT_STEP_0 = {  # policy = reference, beta 0.1
    "sigmoid": math.log(2),
    "sigmoid_norm": math.log(2),
    "aot": math.log(2),
    "aot_unpaired": math.log(2),
    "robust": math.log(2),
    "hinge": 1.0,
    "ipo": 25.0,
    "nca_pair": 2 * math.log(2),
    "bco_pair": 2 * math.log(2),
    "sppo_hard": 50.0,
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "discopop": (math.log(2) + 1) / 2,
    "kto": 0.5,
    "apo_zero_unpaired": 0.5,
    "bco": math.log(2),
    "dpop": math.log(2),
}


@pytest.mark.parametrize("name", AT_STEP_0)
def test_step_0(name):
    same = torch.tensor([-12.5, -3.0]), torch.tensor([-40.0, -7.0])
    pairs = PairLogps(*same, torch.tensor([3, 4]), torch.tensor([5, 1]), *same)
    for eps in (0.0, 0.3) if "label_smoothing" in LOSSES[name].options else (0.0,):
        got = values(name, pairs, LossOptions(label_smoothing=eps)).tolist()
        assert got == pytest.approx([AT_STEP_0[name]] * len(got), rel=1e-6)


def test_every_loss_that_compares_with_a_reference_has_its_step_0():
    compared = {name for name in HERE if LOSSES[name].needs_reference}
    assert compared - set(AT_STEP_0) == {"exo_pair", "soft"}  # theirs depend on eps and q


# Far away -LS(x) is the ramp max(0, -x) and S(x) a step. Slopes are differences of these.


def ramp(x: float) -> float:
    return max(0.0, -x)


def step(x: float) -> float:
    return float(x > 0)


def ramps(q: float, x: float) -> float:
    return q * ramp(x) + (1 - q) * ramp(-x)


BETA, EPS = 0.1, 0.25
FAR = {  # of log-ratios a and b, both far from 0 and from each other; one token, reference 0
    "sigmoid": lambda a, b: ramps(1 - EPS, BETA * (a - b)),
    "ipo": lambda a, b: (a - b - 5) ** 2,
    "hinge": lambda a, b: max(0, 1 - BETA * (a - b)),
    "robust": lambda a, b: ((1 - EPS) * ramp(BETA * (a - b)) - EPS * ramp(-BETA * (a - b))) * 2,
    "exo_pair": lambda a, b: -math.log(1 - EPS if a > b else EPS),
    "nca_pair": lambda a, b: ramp(BETA * a) + ramp(-BETA * a) / 2 + ramp(-BETA * b) / 2,
    "bco_pair": lambda a, b: ramp(BETA * a) + ramp(-BETA * b),
    "sppo_hard": lambda a, b: (a - 5) ** 2 + (b + 5) ** 2,
    "aot": lambda a, b: ramps(1 - EPS, BETA * (a - b)),
    "aot_unpaired": lambda a, b: ramps(1 - EPS, BETA * (a - b)),
    "apo_zero": lambda a, b: step(-a) + step(b),
    "apo_down": lambda a, b: step(a) + step(b - a),
    "discopop": lambda a, b: ramp(BETA * (a - b)),
    "sigmoid_norm": lambda a, b: ramps(1 - EPS, BETA * (a - b)),
    "soft": lambda a, b: ramps(0.75, BETA * (a - b)),
    "dpop": lambda a, b: ramps(1 - EPS, BETA * (a - b - 50 * ramp(a))),
    "sft": lambda a, b: -a,
    "simpo": lambda a, b: ramps(1 - EPS, BETA * (a - b) - 0.5),
    "cpo": lambda a, b: ramps(1 - EPS, BETA * (a - b)),
    "slic": lambda a, b: max(0, 1 - a + b),
    "kto": lambda a, b: step(-a) + step(b),
    "bco": lambda a, b: ramp(BETA * a) + ramp(-BETA * b),
    "apo_zero_unpaired": lambda a, b: step(-a) + step(b),
}
POINTS = [(5e3, -5e3), (-5e3, 5e3), (2e4, 1e4), (-2e4, -1e4), (-1e4, -2e4), (1e4, 2e4)]


def test_every_loss_has_its_limits_here():
    assert {*FAR, "orpo"} == set(HERE)


@pytest.mark.parametrize("name", FAR)
@pytest.mark.parametrize(("a", "b"), POINTS)
def test_extreme_margins(name, a, b):
    """In fp32: the right limit and slopes, margins of 1e4 either way."""
    sides = [torch.tensor([x], requires_grad=True) for x in (a, b)]
    zero, one = torch.zeros(1), torch.ones(1)
    pairs = PairLogps(*sides, one, one, zero, zero, soft_label=torch.tensor([0.75]))
    smoothed = {"label_smoothing": EPS} if "label_smoothing" in LOSSES[name].options else {}
    result = values(name, pairs, LossOptions(beta=BETA, **smoothed)).sum()
    grads = torch.autograd.grad(result, sides, allow_unused=True, materialize_grads=True)
    limit = FAR[name]
    assert result.item() == pytest.approx(limit(a, b), rel=1e-6)
    slopes = (limit(a + 1, b) - limit(a - 1, b)) / 2, (limit(a, b + 1) - limit(a, b - 1)) / 2
    assert [g.item() for g in grads] == pytest.approx(slopes, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("divergence", CHANGES["f_divergence_type"])
@pytest.mark.parametrize("ratio", [1e4, 90.0, -90.0, -1e4])
def test_scores_of_extreme_ratios_are_finite(divergence, ratio):
    chosen = torch.tensor([ratio], requires_grad=True)
    zero = torch.zeros(1)
    pairs = PairLogps(chosen, zero, zero + 1, zero + 1, zero, zero)
    result = values("sigmoid", pairs, LossOptions(f_divergence_type=divergence)).sum()
    result.backward()
    assert result.isfinite() and chosen.grad.isfinite().all()
    assert (result < math.log(2)) == (ratio > 0)


# From a probability of 1e-4343 to one that fp32 cannot tell from 1.
MEANS = [-1e4, -100.0, -1.0, -0.7, -0.69, -0.1, -1e-4, -1e-10, -1e-30]


@pytest.mark.parametrize("p", MEANS)
def test_orpo_from_impossible_to_certain(p):
    """Value and slopes in fp32, against sixty digits."""
    getcontext().prec = 60
    for q in MEANS:
        sides = [torch.tensor([x], requires_grad=True) for x in (p, q)]
        ones = torch.ones(1)
        result = values("orpo", PairLogps(*sides, ones, ones), LossOptions()).sum()
        grads = torch.autograd.grad(result, sides)
        exact = [Decimal(x.item()) for x in sides]
        other = [1 - x.exp() for x in exact]  # probability of anything else
        log_odds = exact[0] - exact[1] - other[0].ln() + other[1].ln()
        minus = (-log_odds).exp()
        value = Decimal("0.1") * ((1 + minus).ln() if log_odds > -500 else -log_odds)
        slope = Decimal("0.1") * minus / (1 + minus)
        assert result.item() == pytest.approx(float(value), rel=1e-5, abs=1e-30)
        expected = [float(-slope / other[0]), float(slope / other[1])]
        assert [g.item() for g in grads] == pytest.approx(expected, rel=3e-5, abs=1e-30)


@pytest.mark.parametrize("x", [-60.0, -20.0, *MEANS[2:]])
def test_log1mexp(x):
    """To a relative 1e-6 where it is next to nothing, too."""
    getcontext().prec = 60
    x = torch.tensor(x)
    exact = (1 - Decimal(x.item()).exp()).ln()
    assert log1mexp(x).item() == pytest.approx(float(exact), rel=1e-6)


def test_orpo_of_certain_tokens_is_finite():
    sides = [torch.tensor([0.0], requires_grad=True), torch.tensor([-1.0], requires_grad=True)]
    ones = torch.ones(1)
    result = values("orpo", PairLogps(*sides, ones, ones), LossOptions()).sum()
    result.backward()
    assert result.isfinite() and all(side.grad.isfinite().all() for side in sides)


# Options.


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"beta": 0}, "beta=0 must be greater"),
        ({"beta": math.inf}, "beta=inf must be finite"),
        ({"label_smoothing": 0.5}, "label_smoothing=0.5"),
        ({"label_smoothing": -0.1}, "label_smoothing=-0.1"),
        ({"f_divergence_type": "js"}, "f_divergence_type=js: choose from .*js_divergence"),
        ({"f_alpha_divergence_coef": 2.0}, "f_alpha_divergence_coef=2.0.*set alpha_divergence"),
        ({"discopop_tau": 0.0}, "discopop_tau=0.0"),
        ({"ld_alpha": 1.5}, "ld_alpha=1.5"),
        ({"ld_reference": False}, "ld_reference=false concerns ld_alpha"),
        ({"token_clamp": 0.0}, "token_clamp=0.0"),
        ({"weighting_clamp": 1.0}, "weighting_clamp=1.0.*set it to true"),
        ({"weighting_clamp": -1.0, "use_weighting": True}, "weighting_clamp=-1.0"),
        ({"token_clamp": 1.0, "reference_free": True}, "token_clamp=1.0.*reference_free"),
        (
            {"ld_alpha": 0.5, "ld_reference": False, "reference_free": True},
            "ld_reference=False.*reference_free",
        ),
        ({"simpo_gamma": -1.0}, "simpo_gamma=-1.0"),
        ({"dpop_lambda": -1.0}, "dpop_lambda=-1.0"),
        ({"undesirable_weight": -1.0}, "undesirable_weight=-1.0"),
    ],
)
def test_bad_options_are_named(changed, message):
    with pytest.raises(ValueError, match=message):
        LossOptions(**changed)


def test_losses_without_what_they_need():
    with pytest.raises(ValueError, match=r"label_smoothing=0.0.*exo_pair.*set it to 1e-3"):
        Objective(("exo_pair",))
    with pytest.raises(ValueError, match="soft needs the column soft_label"):
        values("soft", replace(make_pairs(), soft_label=None), LossOptions())
