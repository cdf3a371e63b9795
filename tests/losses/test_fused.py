"""`preference`, both implementations, against the losses in fp64 and against values by hand."""

import math

import pytest
import torch

from dpo_fast.errors import UnavailableError
from dpo_fast.losses import LOSSES, LossOptions, LossSpec, Objective, Totals, preference
from dpo_fast.losses import from_tokens as module
from dpo_fast.losses.from_tokens import as_pairs
from dpo_fast.ops.dispatch import Choice
from tests.support.device import DEVICE, HAS_TRITON, ON_A_GPU, each_implementation, needs_triton

pytestmark = [
    pytest.mark.usefixtures("on_the_device"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy, dividing by length 0
]


def alone(name: str, **options) -> Objective:
    return Objective((name,), (1.0,), LossOptions(**options))


# As the Triton kernel has them.
KERNEL = ("sigmoid", "ipo", "hinge", "robust", "sigmoid_norm", "sft")
OBJECTIVES = {
    "sigmoid": alone("sigmoid"),
    "sigmoid, smoothed": alone("sigmoid", beta=0.7, label_smoothing=0.3),
    "ipo": alone("ipo", beta=0.7),
    "ipo, sums": alone("ipo", beta=0.02, length_average=False),
    "hinge": alone("hinge", beta=0.05),
    "robust": alone("robust", beta=0.7, label_smoothing=0.2),
    "sigmoid_norm": alone("sigmoid_norm", beta=5.0),
    "sigmoid_norm, smoothed": alone("sigmoid_norm", beta=5.0, label_smoothing=0.3),
    "sft": alone("sft"),
    "mixture": Objective(("sigmoid", "sft", "ipo"), (1.0, 0.4, 0.01), LossOptions(beta=0.3)),
    "all": Objective(KERNEL, (0.5, -0.1, 2, 1, 0.3, 0.7), LossOptions(0.2, 0.1, False)),
    "twice": Objective(("sigmoid", "sigmoid"), (0.25, 0.5)),
}
SIZES = {  # the interpreter's block is 16
    "one pair, one token each": [1, 1],
    "within a block": [3, 16, 5, 2],
    "over several blocks": [17, 40, 1, 33, 100, 16],
    "more pairs than a block": list(range(1, 39)),
}
if ON_A_GPU:  # a GPU's block has 1024 tokens
    SIZES |= {
        "over several of a GPU's blocks": [1025, 4000, 1, 1024, 3000, 2048],
        "more sequences than a GPU's block": [1 + i % 7 for i in range(2100)],
    }
TOTALS = Totals(pairs=1100 if ON_A_GPU else 37, chosen_tokens=411)
each_objective = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)


def make(lengths: list[int], seed: int = 0):
    """logp [T], lengths [S] and a reference [S] that is close enough for no loss to saturate."""
    g = torch.Generator("cpu").manual_seed(seed)
    logp_T = -2 * torch.rand(sum(lengths), generator=g, device="cpu")
    sums_S = torch.stack([x.sum() for x in logp_T.split(lengths)])
    reference_S = sums_S + 3 * torch.randn(len(lengths), generator=g, device="cpu")
    return logp_T.to(DEVICE), torch.tensor(lengths), reference_S.to(DEVICE)


def run(logp_T, lengths_S, reference_S, objective, implementation, upstream=1.0):
    logp_T = logp_T.detach().requires_grad_()
    result = preference(
        logp_T, lengths_S, reference_S, objective, TOTALS, implementation=implementation
    )
    return result, torch.autograd.grad(result.loss * upstream, logp_T)[0]


def in_fp64(logp_T, lengths_S, reference_S, objective):
    """Loss, token gradient, sums and rewards by autograd, and nothing of the operation's own."""
    logp_T = logp_T.detach().double().requires_grad_()
    sums_S = torch.stack([x.sum() for x in logp_T.split(lengths_S.tolist())])
    reference_S = None if reference_S is None else reference_S.double()
    loss = objective(as_pairs(sums_S, lengths_S, reference_S), TOTALS)
    ratios_S = sums_S if reference_S is None else sums_S - reference_S
    rewards_S = objective.options.beta * ratios_S
    length_average = {"ipo": objective.options.length_average, "sigmoid_norm": True, "sft": True}
    if set(objective.names) != {"sft"} and all(map(length_average.get, objective.names)):
        rewards_S = rewards_S / lengths_S.to(rewards_S.device)
    return loss, torch.autograd.grad(loss, logp_T)[0], sums_S.detach(), rewards_S.detach()


def no_worse(got, eager, truth) -> None:
    """No further from fp64 than twice what PyTorch is in fp32, and a rounding of the largest."""
    error = (got.double() - truth).abs()
    allowed = 2 * (eager.double() - truth).abs().max() + 2**-23 * truth.abs().max()
    worst = error.argmax()
    assert (eager.double() - truth).abs().max() <= 1e-4 * truth.abs().max()
    assert got.dtype == torch.float32 and got.shape == truth.shape
    assert error.max() <= allowed, (
        worst,
        *(x.flatten()[worst].item() for x in (got, eager, truth)),
    )


@each_implementation
@each_objective
@pytest.mark.parametrize("lengths", SIZES.values(), ids=SIZES)
def test_matches_fp64_autograd(lengths, objective, implementation, poison):
    inputs = make(lengths)
    truth = in_fp64(*inputs, objective)
    eager, eager_grad = run(*inputs, objective, "torch")
    got, grad = run(*inputs, objective, implementation)
    assert not (got.logps_S.requires_grad or got.rewards_S.requires_grad)
    values = (got.loss, grad, got.logps_S, got.rewards_S)
    for value, same, true in zip(
        values, (eager.loss, eager_grad, eager.logps_S, eager.rewards_S), truth
    ):
        no_worse(value, same, true)


def test_every_loss_and_option_of_the_kernel_is_tried():
    tried = {name for objective in OBJECTIVES.values() for name in objective.names}
    assert tried == {name for name, spec in LOSSES.items() if spec.kernel}
    for name in tried:
        alone = [x.options for x in OBJECTIVES.values() if x.names == (name,)]
        for option in set(LOSSES[name].options) & set(module.KERNEL_OPTIONS) - {"beta"}:
            default = getattr(LossOptions(), option)
            assert any(getattr(options, option) != default for options in alone), (name, option)


@needs_triton
def test_numbers_reach_a_device_in_fp64():
    """The interpreter has Python's. On an H100 a smoothing of 0.2 in fp32 put slopes off by 7e-7."""
    from dpo_fast.kernels.preference import preference_kernel

    types = preference_kernel.fn.__annotations__
    assert {name for name, kind in types.items() if "float64" in str(kind)} == {"beta", "eps"}


@needs_triton
def test_the_kernel_runs_where_it_is_named():
    inputs = make([3, 2])
    for implementation, ours in (("triton", True), ("torch", False), ("auto", ON_A_GPU)):
        result, _ = run(*inputs, Objective(), implementation)
        assert ("_Preference" in type(result.loss.grad_fn).__name__) == ours


@each_implementation
def test_sums_of_long_sequences_lose_nothing(implementation):
    logp_T, lengths_S = torch.full((3001,), -0.1), torch.tensor([2999, 2])
    got, _ = run(logp_T, lengths_S, torch.zeros(2), Objective(), implementation)
    expected = [-0.1 * 2999, -0.2]
    assert got.logps_S.tolist() == pytest.approx(expected, rel=1e-7)


BY_HAND = {"sigmoid": (0.437488, -0.035434), "hinge": (0.4, -0.1), "ipo": (1.0, 2.0)}


@each_implementation
@pytest.mark.parametrize("name", BY_HAND)
def test_values_at_margin_6(name, implementation):
    logp_T, ones = torch.tensor([-1.0, -4.0], requires_grad=True), torch.tensor([1, 1])
    result = preference(
        logp_T,
        ones,
        torch.tensor([-3.0, 0.0]),
        alone(name),
        Totals(1, 1),
        implementation=implementation,
    )
    result.loss.backward()
    value, slope = BY_HAND[name]
    assert result.loss.item() == pytest.approx(value, abs=1e-6)
    assert logp_T.grad.tolist() == pytest.approx([slope, -slope], abs=1e-6)
    assert result.logps_S.tolist() == [-1, -4]
    assert result.rewards_S.tolist() == pytest.approx([0.2, -0.4], rel=1e-6)


@each_implementation
def test_equal_policy_and_reference_give_ln_2_exactly(implementation, poison):
    logp_T, lengths_S, _ = make(SIZES["over several blocks"])
    objective, totals = alone("sigmoid"), Totals(3, 118)
    first = preference(
        logp_T, lengths_S, torch.zeros(6), objective, totals, implementation=implementation
    )
    again = preference(
        logp_T, lengths_S, first.logps_S, objective, totals, implementation=implementation
    )
    assert again.loss.item() == pytest.approx(math.log(2), rel=1e-7)
    assert (again.rewards_S == 0).all()


LIMITS = {  # (value, slope by the chosen) at margins +1e4 and -1e4, beta 0.1
    "sigmoid": (alone("sigmoid"), (0, 0), (1000, -0.1)),
    "cdpo": (alone("sigmoid", label_smoothing=0.25), (250, 0.025), (750, -0.075)),
    "hinge": (alone("hinge"), (0, 0), (1001, -0.1)),
    "robust": (alone("robust", label_smoothing=0.25), (-500, -0.05), (1500, -0.15)),
    "sigmoid_norm": (alone("sigmoid_norm"), (0, 0), (1000, -0.1)),
    "ipo": (alone("ipo"), ((1e4 - 5) ** 2, 2 * (1e4 - 5)), ((1e4 + 5) ** 2, -2 * (1e4 + 5))),
    "sft": (alone("sft"), (0, -1), (1e4, -1)),
}


@each_implementation
@pytest.mark.parametrize("name", LIMITS)
def test_extreme_margins(name, implementation, poison):
    objective, *limits = LIMITS[name]
    ones, zeros = torch.tensor([1, 1]), torch.zeros(2)
    for logps, (value, slope) in zip(([0.0, -1e4], [-1e4, 0.0]), limits):
        logp_T = torch.tensor(logps, requires_grad=True)
        result = preference(
            logp_T, ones, zeros, objective, Totals(1, 1), implementation=implementation
        )
        result.loss.backward()
        assert result.loss.item() == pytest.approx(value, rel=1e-6)
        by_rejected = 0 if name == "sft" else -slope
        assert logp_T.grad.tolist() == pytest.approx([slope, by_rejected], rel=1e-6)


@each_implementation
@each_objective
def test_nan_is_not_hidden(objective, implementation):
    logp_T, lengths_S, reference_S = make([3, 20, 5, 1])
    logp_T[1] = torch.nan
    got, _ = run(logp_T, lengths_S, reference_S, objective, implementation)
    assert got.loss.isnan() and got.logps_S[0].isnan() and not got.logps_S[1:].isnan().any()


@needs_triton
@each_objective
@pytest.mark.parametrize("lengths", [[0, 3, 2, 5], [4, 0, 2, 5], [0, 0, 20, 1]], ids=str)
def test_empty_sequences_give_what_the_definition_gives(lengths, objective, poison):
    """Averages over no tokens are infinite or NaN; sums are 0."""
    inputs = make(lengths)
    eager, eager_grad = run(*inputs, objective, "torch")
    got, grad = run(*inputs, objective, "triton")
    torch.testing.assert_close(tuple(got), tuple(eager), equal_nan=True)
    torch.testing.assert_close(grad, eager_grad, equal_nan=True)


@each_implementation
def test_nothing_to_score(implementation, poison):
    """An empty micro-batch adds nothing to the loss, and backward still runs."""
    got, grad = run(*make_empty(0), Objective(), implementation)
    assert (got.loss.item(), grad.shape) == (0, (0,))
    assert got.logps_S.shape == got.rewards_S.shape == (0,)
    got, grad = run(*make_empty(4), Objective(), implementation)
    assert (got.loss.item(), grad.shape) == (pytest.approx(2 * math.log(2) / TOTALS.pairs), (0,))
    assert got.logps_S.tolist() == [0] * 4


def make_empty(sequences: int):
    return torch.zeros(0), torch.zeros(sequences, dtype=torch.int64), torch.zeros(sequences)


@each_implementation
def test_without_a_reference(implementation, poison):
    logp_T, lengths_S, _ = make([3, 20, 5, 1])
    got, grad = run(logp_T, lengths_S, None, alone("sft", beta=0.5), implementation)
    loss, true_grad, sums_S, rewards_S = in_fp64(logp_T, lengths_S, None, alone("sft", beta=0.5))
    for value, true in zip((got.loss, grad, *got[1:]), (loss, true_grad, sums_S, rewards_S)):
        torch.testing.assert_close(value.double(), true, rtol=1e-6, atol=0)


@needs_triton
def test_no_reference_is_a_reference_of_0_to_the_kernel(poison):
    """What a loss without reference needs beside one that is scaled by beta."""
    from dpo_fast.kernels import preference as kernels

    logp_T, lengths_S, zeros = *make([3, 20, 5, 1])[:2], torch.zeros(4)
    options = {"beta": 0.3, "label_smoothing": 0.1, "length_average": True}
    arguments = (KERNEL, (1.0,) * len(KERNEL))
    without = kernels.preference(logp_T, lengths_S, None, *arguments, **options)
    with_0 = kernels.preference(logp_T, lengths_S, zeros, *arguments, **options)
    assert all(torch.equal(x, y) for x, y in zip(without, with_0))


@each_implementation
def test_upstream_gradient(implementation):
    inputs = make([3, 20, 5, 1])
    _, once = run(*inputs, OBJECTIVES["mixture"], implementation)
    _, scaled = run(*inputs, OBJECTIVES["mixture"], implementation, upstream=-2.5)
    torch.testing.assert_close(scaled, -2.5 * once, rtol=1e-6, atol=0)
    assert once.abs().min() > 0


@each_implementation
def test_strides_and_repeats_do_not_change_a_bit(implementation, poison):
    logp_T, lengths_S, reference_S = make(SIZES["more pairs than a block"])
    result, grad = run(logp_T, lengths_S, reference_S, OBJECTIVES["all"], implementation)
    apart = lambda x: torch.stack([x, x + 1], 1)[:, 0]  # noqa: E731
    for inputs in (
        (logp_T, lengths_S, reference_S),
        (apart(logp_T), apart(lengths_S), apart(reference_S)),
    ):
        again, grad_again = run(*inputs, OBJECTIVES["all"], implementation)
        assert all(torch.equal(x, y) for x, y in zip((*result[:3], grad), (*again[:3], grad_again)))


@each_implementation
def test_mistakes_are_named(implementation):
    logp_T, lengths_S, reference_S = make([3, 2, 1, 4])
    wrong = [
        ({"lengths_S": lengths_S[:3]}, "S even"),
        ({"logp_T": logp_T[None]}, r"logp \(1, 10\)"),
        ({"lengths_S": lengths_S.float()}, "lengths are torch.float32"),
        ({"logp_T": logp_T.bfloat16()}, "bfloat16"),
        ({"reference_S": reference_S[:2]}, r"reference is torch.float32 \(2,\)"),
        ({"reference_S": reference_S.double()}, "reference is torch.float64"),
        ({"reference_S": None}, "'sigmoid'.*need a reference"),
        ({"reference_S": torch.zeros(4, device="meta")}, "different devices.*meta"),
        ({"implementation": "fast"}, "implementation='fast'"),
    ]
    if not ON_A_GPU:  # there it is an assertion of the device, after which a process can do no more
        wrong += [
            ({"logp_T": logp_T[:9]}, "add up to the 9 tokens"),
            ({"logp_T": torch.cat([logp_T, logp_T])}, "add up to the 20 tokens"),
            ({"lengths_S": torch.tensor([3, 4, -1, 4])}, "none be below 0"),
        ]
    good = {
        "logp_T": logp_T,
        "lengths_S": lengths_S,
        "reference_S": reference_S,
        "objective": Objective(),
        "totals": TOTALS,
        "implementation": implementation,
    }
    preference(**good)
    for change, message in wrong:
        with pytest.raises(ValueError, match=message):
            preference(**(good | change))


def test_a_loss_that_the_kernel_cannot_do(monkeypatch):
    spec = LossSpec("gap", lambda pairs, _: pairs.chosen_ratio, "a", "here", "now", ("beta",))
    monkeypatch.setitem(LOSSES, "gap", spec)
    monkeypatch.setattr(module, "choose_implementation", lambda *_: Choice("triton", "a GPU"))
    module._implementation.cache_clear()
    inputs, objective = make([3, 2]), Objective(("sigmoid", "gap"), (1.0, 2.0))
    with pytest.raises(UnavailableError, match="'triton' cannot run preference.*loss gap"):
        run(*inputs, objective, "triton")
    on_gpu = (torch.device("cuda"), torch.float32, "auto")
    assert module._implementation(objective, (), *on_gpu) == "torch"
    plain = Objective(("sigmoid", "sft"), (1.0, 1.0))
    assert module._implementation(plain, (), *on_gpu) == "triton"
    assert module._implementation(plain, ("weight",), *on_gpu) == "torch"
    other = Objective(options=LossOptions(f_divergence_type="js_divergence"))
    assert module._implementation(other, (), *on_gpu) == "torch"
    module._implementation.cache_clear()
    result, grad = run(*inputs, objective, "auto")
    loss, true_grad, *_ = in_fp64(*inputs, objective)
    torch.testing.assert_close((result.loss.double(), grad.double()), (loss, true_grad))


def test_fp64():
    logp_T, lengths_S, reference_S = make([3, 2])
    result, grad = run(logp_T.double(), lengths_S, reference_S, Objective(), "torch")
    assert (result.loss.dtype, grad.dtype) == (torch.float32, torch.float64)
    if HAS_TRITON:
        with pytest.raises(UnavailableError, match="fp64"):
            run(logp_T.double(), lengths_S, reference_S, Objective(), "triton")
