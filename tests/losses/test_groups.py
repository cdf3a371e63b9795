"""Losses on groups of scored completions: formulas in plain Python, gradcheck, extremes, TRL, Liger."""

import math

import pytest
import torch

from dpo_fast.losses import (
    LOSSES,
    GroupLogps,
    LossOptions,
    Objective,
    PairLogps,
    Totals,
    preference,
)
from dpo_fast.losses.groups import extremes, order_kept
from tests.support.scored_groups import (
    CASES,
    COUNTS,
    GROUPED,
    LENGTHS,
    SCORES,
    arguments,
    each_case,
    groups_of,
    make,
    of_tokens,
)

# The formulas once more, completion by completion.


def lists(values: torch.Tensor) -> list[list[float]]:
    return [part.tolist() for part in values.split(LENGTHS)]


def ranking(groups: GroupLogps, o: LossOptions) -> list[float]:
    """A group's loss is minus the log-probability of its ranking: the best first among all, the next among
    those that are left. Of a tie neither meets the other."""
    score = {"js_divergence": lambda r: math.log(2 / (1 + math.exp(-r)))}
    score = score.get(o.f_divergence_type, lambda r: r)
    values = [
        o.beta * score(a - b)
        for a, b in zip(*(x.tolist() for x in (groups.logps, groups.reference)))
    ]
    found = []
    for x, scores in zip(groups_of(values), groups_of(SCORES)):
        for i, mine in enumerate(scores):
            below = [x[j] for j, other in enumerate(scores) if other < mine]
            found.append(-math.log(math.exp(x[i]) / sum(map(math.exp, [x[i], *below]))))
    return found


def policy_gradient(groups: GroupLogps, o: LossOptions) -> list[float]:
    """Sums over the tokens of each completion."""
    gains = []
    for scores in groups_of(SCORES):
        mean = sum(scores) / len(scores)
        deviation = math.sqrt(sum((x - mean) ** 2 for x in scores) / (len(scores) - 1))
        scale = deviation + 1e-4 if o.scale_rewards == "group" else 1.0
        gains += [(x - mean) / scale for x in scores]
    found = []
    high = o.epsilon if o.epsilon_high is None else o.epsilon_high
    for gain, own, old, ref in zip(
        gains, *map(lists, (groups.tokens, groups.old_tokens, groups.reference_tokens))
    ):
        logs = [x - y for x, y in zip(own, old)]
        if o.importance_sampling_level == "sequence":
            logs = [sum(logs) / len(logs)] * len(logs)
        cost = 0.0
        for log, x, r in zip(logs, own, ref):
            weight = math.exp(log)
            bounded = min(max(weight, 1 - o.epsilon), 1 + high)
            cost -= min(weight * gain, bounded * gain)
            cost += o.grpo_beta * (math.exp(r - x) - (r - x) - 1)
        found.append(cost)
    return found


FORMULAS = {
    "plackett_luce": ranking,
    "dapo": policy_gradient,
    "grpo": lambda g, o: [x / n for x, n in zip(policy_gradient(g, o), LENGTHS)],
}


@each_case
def test_formula(name, changed):
    groups, options = make(), LossOptions(**changed)
    got = LOSSES[name].function(groups, options)
    assert got.dtype == torch.float64
    assert got.tolist() == pytest.approx(FORMULAS[name](groups, options), rel=1e-9, abs=1e-12)


def test_every_loss_on_groups_is_here():
    assert set(FORMULAS) == set(GROUPED) == set(CASES)


@each_case
def test_gradcheck(name, changed):
    groups, options = make(seed=3), LossOptions(**changed)
    leaves = [x.clone().requires_grad_() for x in (groups.tokens, groups.reference_tokens)]

    def loss(tokens, reference):
        return LOSSES[name].function(of_tokens(tokens, groups.old_tokens, reference), options)

    assert torch.autograd.gradcheck(loss, leaves)


def test_two_answers_are_sigmoid_and_three_with_one_good_are_s_dpo():
    own, ref = torch.tensor([-3.0, -4.0, -2.5]).double(), torch.tensor([-3.5, -3.0, -2.0]).double()

    def loss(n, scores, counts):
        groups = GroupLogps(own[:n], None, torch.tensor(scores), torch.tensor(counts), ref[:n])
        return LOSSES["plackett_luce"].function(groups, LossOptions(beta=0.3)).sum().item()

    pair = PairLogps(own[:1], own[1:2], None, None, ref[:1], ref[1:2])
    sigmoid = LOSSES["sigmoid"].function(pair, LossOptions(beta=0.3)).item()
    assert loss(2, [1.0, 0.0], [2]) == pytest.approx(sigmoid, rel=1e-12)
    assert loss(2, [0.0, 0.0], [2]) == 0
    x = 0.3 * (own - ref)
    softmax = -math.log(torch.softmax(x, 0)[0].item())
    assert loss(3, [5.0, 1.0, 1.0], [3]) == pytest.approx(softmax, rel=1e-12)


@pytest.mark.parametrize("name", GROUPED)
@pytest.mark.parametrize("far", [1e4, -1e4])
def test_extremes_are_finite(name, far):
    """Log-ratios of 1e4 either way, in fp32: values and slopes are numbers."""
    own = torch.zeros(4, requires_grad=True)
    shift = torch.tensor([far, -far, far, 0.0])
    groups = GroupLogps(
        own,
        torch.ones(4, dtype=torch.int64),
        torch.tensor([1.0, 0.0, 0.0, 1.0]),
        torch.tensor([2, 2]),
        shift,
        own,
        shift,
        shift,
    )
    for changed in CASES[name]:
        values = LOSSES[name].function(groups, LossOptions(**changed))
        slopes = torch.autograd.grad(values.sum(), own)[0]
        assert values.isfinite().all() and slopes.isfinite().all(), changed
    if name == "plackett_luce":  # of a pair the ramp of its margin: the better one loses by 2 far
        margin = 0.1 * (-shift[0] + shift[1]).item()
        values = LOSSES[name].function(groups, LossOptions(beta=0.1))
        assert values[:2].sum().item() == pytest.approx(max(0.0, -margin), rel=1e-6)


# The objective and `preference`


NORMALISERS = {"plackett_luce": 7, "grpo": 19, "dapo": 50}


@pytest.mark.parametrize("name", GROUPED)
def test_shares_add_up_and_weights_are_of_groups(name):
    groups = make(dtype=torch.float32)
    objective = Objective((name,), (1.0,), LossOptions(**CASES[name][-1]))
    weight = torch.tensor([0.5, 2.0, 0.0, 1.0])
    result = preference(**arguments(groups, objective=objective, columns={"weight": weight}))
    per_group = [sum(x) for x in groups_of(FORMULAS[name](groups, objective.options))]
    expected = sum(w * x for w, x in zip(weight.tolist(), per_group)) / NORMALISERS[name]
    assert result.loss.item() == pytest.approx(expected, rel=1e-5)
    shares = 0.0
    for first, last in ((0, 1), (1, 3), (3, 3), (3, 4)):
        a, b = sum(COUNTS[:first]), sum(COUNTS[:last])
        t, u = sum(LENGTHS[:a]), sum(LENGTHS[:b])
        part = GroupLogps(
            groups.logps[a:b],
            groups.lengths[a:b],
            groups.scores[a:b],
            groups.counts[first:last],
            groups.reference[a:b],
            groups.tokens[t:u],
            groups.old_tokens[t:u],
            groups.reference_tokens[t:u],
        )
        columns = {"weight": weight[first:last]}
        shares += preference(**arguments(part, objective=objective, columns=columns)).loss.item()
    assert shares == pytest.approx(expected, rel=1e-5)


def test_mixtures_are_of_one_kind():
    both = Objective(("plackett_luce", "grpo"), (1.0, 0.5))
    groups = make(dtype=torch.float32)
    alone = [Objective((name,)) for name in both.names]
    a, b = (preference(**arguments(groups, objective=x)).loss for x in alone)
    mixed = preference(**arguments(groups, objective=both)).loss
    assert mixed.item() == pytest.approx((a + b / 2).item(), rel=1e-6)
    for other in ("sigmoid", "kto", "sft"):
        with pytest.raises(ValueError, match=f"grpo needs groups .* and {other} does not"):
            Objective(("grpo", other), (1.0, 1.0))


def test_what_is_missing_or_does_not_fit_is_named():
    groups = make(dtype=torch.float32)
    grpo = Objective(("grpo",), (1.0,), LossOptions(grpo_beta=0.1))
    good = arguments(groups, objective=grpo)
    scored = good["groups"]
    wrong = [
        ({"groups": None}, "losses .'grpo',. need groups: scores and counts"),
        (
            {"groups": scored._replace(old_T=None)},
            "need old_T, the log-probs that the completions were",
        ),
        ({"groups": scored._replace(old_T=scored.old_T[1:])}, "need old_T"),
        ({"reference_T": None}, "need reference_T, the reference's log-prob of every token"),
        ({"reference_S": None}, "need a reference; reference_S is None"),
        ({"groups": scored._replace(scores_S=scored.scores_S[1:])}, r"scores are \(10,\).*\(11,\)"),
        ({"groups": scored._replace(counts_P=scored.counts_P + 1)}, "add up to 15; there are 11"),
        ({"groups": scored._replace(counts_P=scored.counts_P.float())}, "torch.int64"),
        ({"groups": scored._replace(counts_P=scored.counts_P[:, None])}, r"expected .*and \[P\]"),
        (
            {"groups": scored._replace(counts_P=torch.tensor([-1, 12]))},
            "add up to 11; there are 11 completions, and no count may be below 0",
        ),
        (
            {"groups": scored._replace(scores_S=scored.scores_S / 0)},
            "scores must be finite; got (inf|-inf|nan)",
        ),
        (
            {"objective": Objective(("dapo",)), "reference_S": None, "totals": Totals(4, 0)},
            r"totals.tokens=0: dapo divides by it, and this batch alone has",
        ),
        ({"objective": Objective(("kto",))}, "'kto'.* do not take groups; groups was given"),
        ({"columns": {"margin": torch.ones(4)}}, r"do not use the columns \['margin'\]"),
    ]
    for change, message in wrong:
        with pytest.raises(ValueError, match=message):
            preference(**(good | change))
    free = Objective(("grpo",))
    assert not free.needs_reference and grpo.needs_reference and grpo.needs_reference_tokens
    alone = arguments(groups, objective=free, reference_S=None, reference_T=None)
    assert preference(**alone).loss.isfinite()


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("epsilon", 1.0, "epsilon=1.0 must be above 0 and below 1"),
        ("epsilon_high", -0.1, "epsilon_high=-0.1 must not be negative"),
        ("scale_rewards", "batch", "scale_rewards=batch: choose from group, none"),
        ("importance_sampling_level", "word", "choose from token, sequence"),
        ("grpo_beta", -1.0, "grpo_beta=-1.0 must not be negative"),
    ],
)
def test_bad_options_are_named(option, value, message):
    with pytest.raises(ValueError, match=message):
        LossOptions(**{option: value})


def test_sides_and_order():
    scores, counts = torch.tensor(SCORES), torch.tensor(COUNTS)
    best, worst = extremes(scores, counts)
    assert best.nonzero().flatten().tolist() == [1, 6, 7, 10]
    assert worst.nonzero().flatten().tolist() == [2, 8, 9]
    rewards = torch.tensor([0.0, 1.0, -1.0, 5.0, 4.0, 1.0, 1.0, 0.0, 2.0, 3.0, 2.0])
    kept, count = order_kept(rewards, scores, counts)
    # 3 of 3; none; (5>8) (6>5) (6>8) (7>5) (7>8) with one tie (6, 5); 10 > 9 is turned round.
    assert (kept.item(), count.item()) == (3 + 0.5, 3 + 5 + 1)
