"""From tokens to the objective: the options that change sums and weights, columns, shares, totals."""

import math
from dataclasses import replace

import pytest
import torch

from dpo_fast.losses import (
    LOSSES,
    LossOptions,
    Objective,
    PairLogps,
    ScoredGroups,
    SequenceLogps,
    Totals,
    preference,
)

LENGTHS = [3, 5, 6, 2, 4, 4]  # chosen and rejected in turn: shorter, longer, equal
PAIRS, TOKENS = len(LENGTHS) // 2, sum(LENGTHS)
TOTALS = Totals(PAIRS, sum(LENGTHS[0::2]), 2 * PAIRS, TOKENS)
SCORES, COUNTS = torch.tensor([0.1, 0.9, 0.5, -2.0, 1.0, 1.5]), torch.tensor([2, 3, 1])
OLD = -2 * torch.rand(TOKENS, generator=torch.Generator().manual_seed(5))
UNGROUPED = [name for name, spec in LOSSES.items() if not spec.grouped]
each_loss = pytest.mark.parametrize("name", LOSSES)


def make_tokens(seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    negative = lambda: -2 * torch.rand(TOKENS, generator=g)  # noqa: E731
    tokens = {"logp_T": negative(), "reference_T": negative(), "log_sum_p2_T": negative() / 2}
    sums = [x.sum() for x in tokens["reference_T"].split(LENGTHS)]
    return tokens | {"lengths_S": torch.tensor(LENGTHS), "reference_S": torch.stack(sums)}


COLUMNS = {
    "weight": torch.tensor([0.5, 2.0, 1.25]),
    "margin": torch.tensor([0.1, 0.6, 0.3]),
    "soft_label": torch.tensor([0.9, 0.6, 0.75]),
}


def run(name: str, columns=(), **options) -> float:
    """Loss of the tokens above, with the options and columns that it requires."""
    needed = dict.fromkeys(LOSSES[name].needs_options, 1e-3)
    objective = Objective((name,), (1.0,), LossOptions(**(needed | options)))
    columns = {key: COLUMNS[key] for key in (*LOSSES[name].needs_columns, *columns)}
    groups = ScoredGroups(SCORES, COUNTS, OLD) if objective.grouped else None
    result = preference(
        **make_tokens(), objective=objective, totals=TOTALS, columns=columns, groups=groups
    )
    return result.loss.item()


# The walk of the table.

CHANGED = {
    "beta": 0.7, "label_smoothing": 0.3, "length_average": False,
    "f_divergence_type": "js_divergence", "f_alpha_divergence_coef": 0.2, "discopop_tau": 0.5,
    "simpo_gamma": 0.1, "cpo_alpha": 0.3, "dpop_lambda": 3.0, "slic_delta": 0.2,
    "slic_lambda": 0.4, "desirable_weight": 0.7, "undesirable_weight": 1.3, "ld_alpha": 0.3,
    "ld_reference": False, "token_clamp": 0.2, "reference_free": True, "use_weighting": True,
    "weighting_clamp": 0.1, "epsilon": 0.4, "epsilon_high": 0.7, "scale_rewards": "none",
    "importance_sampling_level": "sequence", "grpo_beta": 0.2,
}  # fmt: skip
COMPANIONS = {
    "f_alpha_divergence_coef": {"f_divergence_type": "alpha_divergence"},
    "ld_reference": {"ld_alpha": 0.3},
    "weighting_clamp": {"use_weighting": True},
}


def test_every_option_is_walked():
    assert set(CHANGED) == set(vars(LossOptions()))
    assert {option for spec in LOSSES.values() for option in spec.options} == set(CHANGED)


@each_loss
@pytest.mark.parametrize("option", CHANGED)
def test_an_option_changes_the_loss_or_is_refused(name, option):
    companions, value = COMPANIONS.get(option, {}), CHANGED[option]
    if option in LOSSES[name].options:
        before, after = run(name, **companions), run(name, **companions, **{option: value})
        assert math.isfinite(after) and after != pytest.approx(before, rel=1e-4)
    elif option == "beta":  # it scales the rewards that are logged
        assert run(name, beta=value) == run(name)
    else:
        takers = [taker for taker, spec in LOSSES.items() if option in spec.options]
        pattern = f"{option}={value} is not used by {name}; remove it, or choose .*{takers[0]}"
        if set(companions) <= set(LOSSES[name].options):
            with pytest.raises(ValueError, match=pattern):
                run(name, **companions, **{option: value})
        else:  # the companion is refused first
            with pytest.raises(ValueError, match=f"is not used by {name}"):
                run(name, **companions, **{option: value})


@each_loss
@pytest.mark.parametrize("column", COLUMNS)
def test_a_column_changes_the_loss_or_is_refused(name, column):
    spec = LOSSES[name]
    if column in spec.needs_columns:
        objective = Objective((name,))
        with pytest.raises(ValueError, match=rf"'{name}'.*need the columns \['{column}'\]"):
            preference(**make_tokens(), objective=objective, totals=TOTALS)
    elif column in spec.columns:
        assert run(name, columns=[column]) != pytest.approx(run(name), rel=1e-4)
    else:
        with pytest.raises(ValueError, match=rf"'{name}'.*do not use the columns \['{column}'\]"):
            run(name, columns=[column])


# Sums and weights, token by token in plain Python.


def sides(values_T: torch.Tensor) -> list[tuple[list[float], list[float]]]:
    each = [part.tolist() for part in values_T.double().split(LENGTHS)]
    return list(zip(each[0::2], each[1::2]))


def sigmoid_loss(gaps, beta: float = 0.1) -> float:
    return sum(-math.log(1 / (1 + math.exp(-beta * gap))) for gap in gaps) / PAIRS


@pytest.mark.parametrize("reference_too", [True, False])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_ld_alpha(alpha, reference_too):
    """The first min(nw, nl) tokens count in full, those after them alpha."""
    tokens = make_tokens()
    gaps = []
    for policy, reference in zip(sides(tokens["logp_T"]), sides(tokens["reference_T"])):
        shorter = min(map(len, policy))
        weigh = lambda x, n=shorter: sum(x[:n]) + alpha * sum(x[n:])  # noqa: E731
        compare = weigh if reference_too else sum
        ratios = [weigh(p) - compare(r) for p, r in zip(policy, reference)]
        gaps.append(ratios[0] - ratios[1])
    got = run("sigmoid", ld_alpha=alpha, ld_reference=reference_too)
    assert got == pytest.approx(sigmoid_loss(gaps), rel=1e-6)


def test_token_clamp():
    tokens, bound = make_tokens(), 0.4
    gaps = []
    for policy, reference in zip(sides(tokens["logp_T"]), sides(tokens["reference_T"])):
        ratios = [
            sum(max(-bound, min(bound, p - r)) for p, r in zip(*side))
            for side in zip(policy, reference)
        ]
        gaps.append(ratios[0] - ratios[1])
    assert run("sigmoid", token_clamp=bound) == pytest.approx(sigmoid_loss(gaps), rel=1e-6)


def test_reference_free():
    gaps = [sum(chosen) - sum(rejected) for chosen, rejected in sides(make_tokens()["logp_T"])]
    assert run("sigmoid", reference_free=True) == pytest.approx(sigmoid_loss(gaps), rel=1e-6)
    objective = Objective(options=LossOptions(reference_free=True))
    assert not objective.needs_reference and Objective().needs_reference


@pytest.mark.parametrize("bound", [None, 0.4])
def test_use_weighting(bound):
    """exp of the mean of logp - log sum p^2, of both sides, times the loss; no gradient through it."""
    tokens = make_tokens()
    weights = []
    for logp, log_sum_p2 in zip(sides(tokens["logp_T"]), sides(tokens["log_sum_p2_T"])):
        means = [(sum(x) - sum(y)) / len(x) for x, y in zip(logp, log_sum_p2)]
        weights.append(math.exp(sum(means)))
    assert min(weights) < 0.4 < max(weights)
    weights = weights if bound is None else [min(w, bound) for w in weights]
    logp_T, log_sum_p2_T = tokens.pop("logp_T").requires_grad_(), tokens["log_sum_p2_T"]
    log_sum_p2_T.requires_grad_()
    options = LossOptions(use_weighting=True, weighting_clamp=bound)
    weighted = preference(logp_T, objective=Objective(options=options), totals=TOTALS, **tokens)
    columns = {"weight": torch.tensor(weights)}
    plain = preference(logp_T, objective=Objective(), totals=TOTALS, columns=columns, **tokens)
    assert weighted.loss.item() == pytest.approx(plain.loss.item(), rel=1e-6)
    slopes = [
        torch.autograd.grad(x.loss, (logp_T, log_sum_p2_T), allow_unused=True)
        for x in (weighted, plain)
    ]
    torch.testing.assert_close(slopes[0][0], slopes[1][0], rtol=1e-5, atol=0)
    assert slopes[0][1] is None
    both = run("sigmoid", columns=["weight"], use_weighting=True, weighting_clamp=bound)
    columns["weight"] = columns["weight"] * COLUMNS["weight"]
    product = preference(logp_T, objective=Objective(), totals=TOTALS, columns=columns, **tokens)
    assert both == pytest.approx(product.loss.item(), rel=1e-6)


@pytest.mark.parametrize(("name", "share"), [("cpo", "cpo_alpha"), ("slic", "slic_lambda")])
def test_sft_terms_see_plain_sums(name, share):
    """ld_alpha changes the sums of the other losses; the likelihood still counts every token."""
    nll = -sum(sum(chosen) for chosen, _ in sides(make_tokens()["logp_T"])) / TOTALS.chosen_tokens
    got, without = (run(name, ld_alpha=0.3, **{share: weight}) for weight in (0.5, 0.0))
    assert got - without == pytest.approx(0.5 * nll, rel=1e-5)


def test_sft_beside_an_option_of_another_loss():
    tokens = make_tokens()
    options = LossOptions(ld_alpha=0.3)
    both = Objective(("sigmoid", "sft"), (1.0, 0.5), options)
    got = preference(**tokens, objective=both, totals=TOTALS).loss.item()
    nll = -sum(sum(chosen) for chosen, _ in sides(tokens["logp_T"])) / TOTALS.chosen_tokens
    assert got == pytest.approx(run("sigmoid", ld_alpha=0.3) + 0.5 * nll, rel=1e-6)


@pytest.mark.parametrize("name", [name for name in UNGROUPED if not LOSSES[name].paired])
def test_unpaired_completions_and_pairs_give_the_same(name):
    statistics = {"kl": torch.tensor(0.4), "delta": torch.tensor(-0.2)}
    objective = Objective((name,), (1.0,), LossOptions(token_clamp=0.5, desirable_weight=1.5))
    given = {"objective": objective, "totals": TOTALS, "statistics": statistics}
    desirable_S = torch.tensor([True, False] * PAIRS)
    pairs = preference(**make_tokens(), **given)
    apart = preference(**make_tokens(), **given, desirable_S=desirable_S)
    assert pairs.loss.item() == pytest.approx(apart.loss.item(), rel=1e-6)
    assert torch.equal(pairs.rewards_S, apart.rewards_S)
    flipped = preference(**make_tokens(), **given, desirable_S=~desirable_S)
    assert flipped.loss.item() != pytest.approx(apart.loss.item(), rel=1e-3)


@pytest.mark.parametrize(
    ("options", "missing", "message"),
    [
        ({"ld_alpha": 0.5}, "reference_T", "reference.per_token=true"),
        ({"token_clamp": 0.5}, "reference_T", "reference.per_token=true"),
        ({"use_weighting": True}, "log_sum_p2_T", "log_sum_p2"),
    ],
)
def test_tokens_that_an_option_needs(options, missing, message):
    objective = Objective(options=LossOptions(**options))
    tokens = make_tokens() | {missing: None}
    with pytest.raises(ValueError, match=message):
        preference(**tokens, objective=objective, totals=TOTALS)


def test_pairs_that_a_loss_needs():
    desirable_S = torch.tensor([True, False] * PAIRS)
    with pytest.raises(ValueError, match=r"\['sigmoid'\] compare the answers of pairs"):
        objective = Objective(("kto", "sigmoid"), (1.0, 1.0))
        preference(**make_tokens(), objective=objective, totals=TOTALS, desirable_S=desirable_S)


# The objective: mixtures, and shares of a global batch.


def make_pairs() -> PairLogps:
    g = torch.Generator().manual_seed(2)
    draw = lambda: -6 * torch.rand(5, generator=g).double() - 0.5  # noqa: E731
    lengths = torch.tensor([1.0, 2, 7, 3, 4]).double(), torch.tensor([2.0, 1, 3, 9, 5]).double()
    columns = 0.3 * torch.rand(5, generator=g).double(), torch.rand(5, generator=g).double()
    return PairLogps(draw(), draw(), *lengths, draw(), draw(), *columns)


def part_of(pairs: PairLogps, rows: slice) -> PairLogps:
    own = {name: x[rows] for name, x in vars(pairs).items() if x is not None}
    return replace(pairs, **own)


GLOBAL = Totals(pairs=5, chosen_tokens=17, sequences=10)
WEIGHT = torch.tensor([0.5, 2.0, 1.0, 0.0, 3.0]).double()


def needed_options(name: str) -> LossOptions:
    return LossOptions(**dict.fromkeys(LOSSES[name].needs_options, 1e-3))


@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["", "weight"])
@pytest.mark.parametrize("name", [name for name in UNGROUPED if not LOSSES[name].coupled])
def test_shares_of_micro_batches_add_up(name, weight):
    """Micro-batches of unequal sizes and token counts, one of them empty, give what one gives."""
    pairs, objective = make_pairs(), Objective((name,), (1.0,), needed_options(name))
    whole = objective(pairs, GLOBAL, weight)
    cuts = [slice(0, 1), slice(1, 4), slice(4, 4), slice(4, 5)]
    shares = [
        objective(part_of(pairs, cut), GLOBAL, None if weight is None else weight[cut])
        for cut in cuts
    ]
    assert sum(shares).item() == pytest.approx(whole.item(), rel=1e-12)


@pytest.mark.parametrize("name", UNGROUPED)
def test_each_loss_is_divided_by_its_own_total(name):
    pairs, spec, options = make_pairs(), LOSSES[name], needed_options(name)
    rows = pairs if spec.paired else pairs.sequences
    values = spec.function(rows, options)
    count = {"pairs": 5, "chosen_tokens": 17, "sequences": 10}[spec.normaliser]
    sft = {"cpo": 1.0, "orpo": 1.0, "slic": 0.1}.get(name, 0.0)
    expected = values.sum() / count - sft * pairs.chosen.sum() / 17
    got = Objective((name,), (1.0,), options)(pairs, GLOBAL)
    assert got.item() == pytest.approx(expected.item(), rel=1e-12)
    weighted = Objective((name,), (-2.5,), options)(pairs, GLOBAL)
    assert weighted.item() == pytest.approx(-2.5 * expected.item(), rel=1e-12)


def test_a_mixture_is_the_weighted_sum_of_its_losses():
    pairs, names, weights = make_pairs(), ("sigmoid", "cpo", "kto", "sft"), (0.8, 0.3, 2.0, -0.1)
    options = LossOptions(beta=0.3, cpo_alpha=0.5)
    alone = [
        Objective((name,), (1.0,), LossOptions(0.3) if name != "cpo" else options)(pairs, GLOBAL)
        for name in names
    ]
    expected = sum(w * loss.item() for w, loss in zip(weights, alone))
    got = Objective(names, weights, options)(pairs, GLOBAL)
    assert got.item() == pytest.approx(expected, rel=1e-12)


def test_weights_of_rows_multiply_sft_terms_too():
    pairs, ones = make_pairs(), torch.ones(5).double()
    for name in ("cpo", "orpo", "slic", "sft", "kto", "sigmoid"):
        objective = Objective((name,))
        by_row = [
            objective(part_of(pairs, slice(i, i + 1)), GLOBAL) * w for i, w in enumerate(WEIGHT)
        ]
        assert objective(pairs, GLOBAL, WEIGHT).item() == pytest.approx(
            sum(by_row).item(), rel=1e-12
        )
        assert objective(pairs, GLOBAL, ones).item() == pytest.approx(
            objective(pairs, GLOBAL).item(), rel=1e-12
        )


def test_weights_of_unpaired_completions():
    sequences = make_pairs().sequences
    weight = torch.arange(10).double()
    got = Objective(("kto",))(sequences, GLOBAL, weight)
    values = LOSSES["kto"].function(sequences, LossOptions())
    assert got.item() == pytest.approx((values * weight).sum().item() / 10, rel=1e-12)


@pytest.mark.parametrize("name", [name for name, spec in LOSSES.items() if spec.paired])
def test_rewards_say_which_answer_the_loss_prefers(name):
    """A chosen answer of 20 tokens at -1, a rejected one of 5 at -3: by sums and by means they differ."""
    make = lambda x: torch.tensor([x]).double()  # noqa: E731
    reference = (make(0.0), make(0.0)) if LOSSES[name].needs_reference else (None, None)
    options = replace(needed_options(name), beta=2.0)
    mean = LOSSES[name].divides(options)
    for names in ((name,), (name, "sft")):
        objective = Objective(names, (1.0,) * len(names), options)
        pairs = PairLogps(*map(make, (-20.0, -15.0, 20.0, 5.0)), *reference)
        expected = [-2.0, -6.0] if mean else [-40.0, -30.0]
        assert objective.rewards(pairs).tolist() == pytest.approx(expected)
    assert mean == (name in ("ipo", "sigmoid_norm", "simpo", "orpo"))
    both = Objective((name, "cpo"), (1.0, 1.0), options)  # by sums and by means: sums
    assert both.rewards(pairs).tolist() == [-40.0, -30.0]


def test_rewards_are_beta_times_the_log_ratio():
    make = lambda x: torch.tensor([x]).double()  # noqa: E731
    pairs = PairLogps(*map(make, (-1.0, -4.0, 1.0, 1.0, -2.0, -3.0)))
    objective = Objective(options=LossOptions(beta=0.5))
    assert objective.rewards(pairs).tolist() == [0.5, -0.5]
    assert objective.rewards(pairs.sequences).tolist() == [0.5, -0.5]
    alone = SequenceLogps(make(-3.0), make(2.0), torch.tensor([True]))
    assert objective.rewards(alone).tolist() == [-1.5]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Objective(("sigmod",)), r"\['sigmod'\] is not known; choose from sigmoid"),
        (lambda: Objective((), ()), "not known"),
        (lambda: Objective(("sigmoid", "sft"), (1.0,)), "2 losses"),
        (
            lambda: Objective(("kto", "sigmoid"), (1.0, 1.0), LossOptions(ld_alpha=0.5)),
            "ld_alpha=0.5 is not used by kto",
        ),
        (
            lambda: Objective(("sigmoid", "aot"), (1.0, 1.0), LossOptions(use_weighting=True)),
            "use_weighting=True is not used by aot",
        ),
        (
            lambda: Objective(
                ("nca_pair", "sigmoid"), (1.0, 1.0), LossOptions(f_divergence_type="forward_kl")
            ),
            "f_divergence_type=forward_kl is not used by nca_pair",
        ),
        (
            lambda: Objective(("sft",), (1.0,), LossOptions(ld_alpha=0.5)),
            "ld_alpha=0.5 is not used by sft",
        ),
    ],
)
def test_bad_objectives_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_weights_of_rows_have_no_place_in_a_loss_that_sorts_them():
    objective = Objective(("sigmoid", "aot"), (1.0, 1.0))
    columns = {"weight": COLUMNS["weight"]}
    with pytest.raises(ValueError, match="sorted over the batch"):
        preference(**make_tokens(), objective=objective, totals=TOTALS, columns=columns)
