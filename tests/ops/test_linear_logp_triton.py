"""The Triton implementation of `linear_logp` against its definition in fp64.

Interpreted on a CPU; on a GPU with `TRITON_INTERPRET=0 pytest tests/ops/test_linear_logp_triton.py`.
"""

import contextlib
import dataclasses
import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_fast.ops import eager, linear_logp
from dpo_fast.ops.linear_logp import op
from dpo_fast.ops.linear_logp.call import EXTRAS, HeadOptions
from tests.support.device import DEVICE, ON_A_GPU, needs_interpreter, needs_triton

kernels = pytest.importorskip("dpo_fast.kernels.linear_logp")
tiles = pytest.importorskip("dpo_fast.kernels.tiles")
pytestmark = [
    needs_triton,
    pytest.mark.usefixtures("on_the_device"),
    # numpy warns where padding rows and masked logits meet infinities; the results are checked.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
# g is rounded once to the operands' dtype before its product; eager's fp32 logits are not.
SLACK = {FP32: 1e-6, FP16: 2**-11, BF16: 2**-8}
OPTIONS = {"logit_scale": -0.7, "softcap": 5.0, "temperature": 1.3}


def make(T, V, D, dtype, *, bias=False, spread=1.0):
    """Hidden, weight, targets and bias, with logits of standard deviation `spread`."""
    g = torch.Generator("cpu").manual_seed(T + V + D)
    randn = partial(torch.randn, generator=g, device="cpu")
    hidden = randn(T, D).to(DEVICE, dtype)
    weight = (randn(V, D) * spread / D**0.5).to(DEVICE, dtype)
    targets = torch.randint(V, (T,), generator=g, device="cpu").to(DEVICE)
    if T:
        targets[0], targets[-1] = 0, V - 1  # both ends of the vocabulary
    return hidden, weight, targets, randn(V).to(DEVICE, dtype) if bias else None


def evaluate(function, hidden, weight, targets, bias, **options):
    """Outputs and gradients by name, in fp64, for fixed slopes dL/dlogp of both signs."""
    leaves = {"dH": hidden, "dW": weight, "db": bias}
    leaves = {k: x.detach().requires_grad_() for k, x in leaves.items() if x is not None}
    result = function(leaves["dH"], leaves["dW"], targets, bias=leaves.get("db"), **options)
    result = result if isinstance(result, dict) else result._asdict()
    slopes = torch.linspace(-1, 2, len(targets)).to(result["logp"].dtype)
    found = torch.autograd.grad(result["logp"], list(leaves.values()), slopes)
    result = {k: v.detach() for k, v in result.items() if v is not None}
    return {k: v.double() for k, v in (result | dict(zip(leaves, found))).items()}


def assert_as_good_as_eager(got, same, truth, dtype, terms=1.0):
    """No further from fp64 than twice the same mathematics in the same dtype, plus slack, and a few
    roundings of the `terms` that it is a sum of, which may cancel."""
    for name, true in truth.items():
        if not true.numel():
            assert got[name].shape == true.shape
            continue
        error, allowed = (got[name] - true).abs(), (same[name] - true).abs().max()
        slack = SLACK[dtype] if name.startswith("d") else 1e-6
        allowed = 2 * allowed + slack * true.abs().max() + 1e-6 * terms
        index = error.argmax().item()
        values = [x.flatten()[index].item() for x in (got[name], same[name], true)]
        message = f"{name}[{index}]: got, eager, truth = {values}; allowed {allowed:.3g}"
        assert error.max() <= allowed, message


def check(T, V, D, dtype, *, budget=1 << 30, bias=False, spread=1.0, extras=(), **options):
    inputs = make(T, V, D, dtype, bias=bias, spread=spread)
    double = [x if x is None or not x.is_floating_point() else x.double() for x in inputs]
    options = dict(options, extras=extras)
    got = evaluate(linear_logp, *inputs, implementation="triton", workspace_bytes=budget, **options)
    same = evaluate(eager.linear_logp, *inputs, **options)
    truth = evaluate(eager.linear_logp, *double, **options)
    head = {k: v for k, v in options.items() if k != "extras"}
    logits = eager.head_logits(*double[:2], double[3], **head)
    if "is_top1" in truth and T:
        # Whether a target within a rounding of the largest logit is the largest, rounding decides.
        short = logits.amax(-1) - logits.gather(1, inputs[2][:, None])[:, 0]
        close = (short > 0) & (short <= 1e-5 * (1 + logits.abs().amax(-1)))
        got["is_top1"] = torch.where(close, truth["is_top1"], got["is_top1"])
    largest = [2 * x.abs().max().item() for x in inputs[:2] if x.numel()]
    largest = [x * max(1.0, logits.abs().max().item()) for x in (1.0, *largest) if T]
    assert_as_good_as_eager(got, same, truth, dtype, max([1.0, *largest]))


SCHEDULES = {  # what a plan may be, in sizes of the interpreter's tiles
    "keep": {"schedule": "keep", "kept_tokens": None},
    "recompute": {"schedule": "recompute", "kept_tokens": 0},
    "mixed, vocabulary first": {"schedule": "mixed", "kept_tokens": 5, "tokens_first": False},
    "mixed, tokens first": {"schedule": "mixed", "kept_tokens": 5, "tokens_first": True},
    "mixed, residual, tokens first": {
        "schedule": "mixed",
        "kept_tokens": 5,
        "tokens_first": True,
        "residual_sums": True,
    },
    "recompute, residual, vocabulary first": {
        "schedule": "recompute",
        "kept_tokens": 0,
        "tokens_first": False,
        "residual_sums": True,
    },
}


@contextlib.contextmanager
def forced(columns):
    """Every trainable call runs this schedule, in tiles of 16 x 32 and passes of at most 16 tokens."""
    from dpo_fast.ops.linear_logp import triton as ops

    plan_call = op.plan_call

    def plan(hidden_TD, *arguments):
        chosen, T = plan_call(hidden_TD, *arguments), len(hidden_TD)
        kept = columns["kept_tokens"]
        kept = 0 if hidden_TD.dtype == FP16 else T if kept is None else kept  # fp16 never keeps
        own = {**columns, "kept_tokens": kept}
        if chosen.schedule in ("keep", "recompute", "mixed") and kept <= T:
            chosen = dataclasses.replace(chosen, **own, token_chunk=16, vocab_block=32)
        return chosen

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(op, "plan_call", plan)
        patch.setattr(ops, "CHUNK_TOKENS", 16)
        yield


@pytest.fixture(params=SCHEDULES)
def schedule(request):
    with forced(SCHEDULES[request.param]):
        yield request.param


SHAPES = [  # the interpreter's tiles are 16 x 32 x 32
    (0, 33, 8),  # nothing to score
    (1, 1, 1),  # the smallest of everything: p = 1 and every gradient is 0
    (1, 131, 40),  # one token; V and D are no multiples of a block
    (16, 64, 32),  # whole tiles
    (37, 131, 70),  # primes: ragged tiles everywhere
]
if (
    ON_A_GPU
):  # its tiles are up to 256 wide and 64 deep; whole heads are what `make gpu` begins with
    SHAPES += [(300, 1009, 200), (1000, 32_001, 896), (257, 40_009, 1536)]


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_definition(shape, dtype, poison):
    check(*shape, dtype)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_every_option_at_once(dtype, poison):
    check(19, 67, 40, dtype, bias=True, extras=EXTRAS, **OPTIONS)


@pytest.mark.parametrize("name", OPTIONS)
def test_each_option_alone(name, poison):
    check(19, 67, 40, FP32, **{name: OPTIONS[name]})


def test_bias_alone(poison):
    check(19, 67, 40, BF16, bias=True)


@pytest.mark.parametrize("extra", EXTRAS)
def test_each_extra_alone(extra, poison):
    check(19, 67, 40, FP32, extras=(extra,))


@pytest.mark.emulator
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_every_schedule(dtype, schedule, poison):
    """37 tokens and 75 columns: ragged chunks, blocks and tiles, with and without options."""
    check(37, 75, 24, dtype)
    check(37, 75, 24, dtype, bias=True, softcap=5.0, temperature=1.3)


ANYTHING = {
    "T": st.integers(0, 40),
    "V": st.integers(1, 90),
    "D": st.integers(1, 40),
    "dtype": st.sampled_from([FP32, BF16, FP16]),
    "schedule": st.sampled_from(list(SCHEDULES)),
    "bias": st.booleans(),
    "extras": st.sets(st.sampled_from(EXTRAS)),
    "options": st.sampled_from([{}, OPTIONS, {"softcap": 2.0}, {"logit_scale": 0.1}]),
    "spread": st.sampled_from([0.1, 1.0, 10.0]),
}
if (
    ON_A_GPU
):  # what a kernel is compiled for takes seconds each: as in test_every_schedule, and no more
    ANYTHING |= {
        "T": st.integers(0, 300),
        "V": st.integers(1, 300).map(lambda n: 2 * n + 1),
        "D": st.sampled_from([8, 24, 40]),
        "dtype": st.sampled_from([FP32, BF16]),
        "bias": st.just(False),
        "extras": st.just(set()),
        "options": st.just({}),
    }


@pytest.mark.emulator
@settings(max_examples=25, deadline=None)
@given(**ANYTHING)
def test_any_shape(T, V, D, dtype, schedule, bias, extras, options, spread):
    with forced(SCHEDULES[schedule]):
        extras = tuple(sorted(extras))
        check(T, V, D, dtype, bias=bias, extras=extras, spread=spread, **options)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_frozen_head_and_frozen_hidden(dtype, poison):
    hidden, weight, targets, bias = make(19, 67, 40, dtype, bias=True)
    full = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    whole = linear_logp(*full[:2], targets, bias=full[2], implementation="triton", **OPTIONS)
    slopes = torch.linspace(-1, 2, 19)
    whole.logp.backward(slopes)
    for needs in [(True, False, False), (False, True, False), (False, False, True)]:
        leaves = [x.clone().requires_grad_(n) for x, n in zip((hidden, weight, bias), needs)]
        part = linear_logp(*leaves[:2], targets, bias=leaves[2], implementation="triton", **OPTIONS)
        part.logp.backward(slopes)
        for leaf, reference, needed in zip(leaves, full, needs):
            assert (leaf.grad is not None) == needed
            if needed:  # a frozen head's gradient is rounded before it is scaled
                slack = SLACK[dtype] * 2 * reference.grad.abs().max()
                assert (leaf.grad - reference.grad).abs().max() <= slack


def test_masked_vocabulary(poison):
    """Bias of -inf over the first split, a block and a ragged end: p = 0 and no NaN."""
    inputs = make(9, 170, 24, FP32, bias=True)
    targets, bias = inputs[2], inputs[3]
    bias[:32], bias[64:97], bias[165:] = (-torch.inf,) * 3
    targets.copy_(torch.tensor([32, 33, 63, 97, 98, 128, 160, 163, 164]))
    extras = ("entropy", "log_sum_p2", "is_top1")
    got = evaluate(linear_logp, *inputs, extras=extras, implementation="triton")
    double = [x.double() if x.is_floating_point() else x for x in inputs]
    truth = evaluate(eager.linear_logp, *double, extras=extras)
    for name, value in truth.items():
        assert torch.isfinite(value).all() and torch.isfinite(got[name]).all(), name
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-6)
    assert (got["dW"][bias == -torch.inf] == 0).all()


@pytest.mark.parametrize("budget", [0, 1 << 30], ids=["recompute", "keep"])
def test_columns_far_below_the_others_add_nothing(budget):
    """Whole tiles of them: their distance from the maximum times a sum is more than fp32 has."""
    hidden, weight = torch.zeros(2, 8), torch.zeros(1200, 8)
    hidden[:, 0], weight[:700, 0] = 1.0, -2e38
    targets, extras = torch.tensor([900, 1199]), ("entropy", "log_sum_p2")
    inputs = (hidden.requires_grad_(), weight.requires_grad_(), targets)
    got = linear_logp(*inputs, extras=extras, implementation="triton", workspace_bytes=budget)
    truth = eager.linear_logp(*inputs, extras=extras)
    for name, value in truth.items():
        torch.testing.assert_close(getattr(got, name), value)


def test_logits_of_ten_thousand(poison):
    hidden, weight, targets, _ = make(8, 70, 16, FP32)
    weight *= 1e4 / (hidden @ weight.t()).abs().max()
    inputs = (hidden, weight, targets, None)
    got = evaluate(linear_logp, *inputs, extras=EXTRAS, implementation="triton")
    double = (hidden.double(), weight.double(), targets, None)
    same = evaluate(eager.linear_logp, *inputs, extras=EXTRAS)
    truth = evaluate(eager.linear_logp, *double, extras=EXTRAS)
    for name in truth:
        assert torch.isfinite(got[name]).all(), name
    # fp32 logits near 1e4 are 1e-3 apart, and p = exp(z - lse) inherits that in eager as here.
    assert (got["logp"] - truth["logp"]).abs().max() <= 4e-3
    for name in ("dH", "dW"):
        size = truth[name].abs().max()
        allowed = 2 * (same[name] - truth[name]).abs().max() + 2e-3 * size
        assert (got[name] - truth[name]).abs().max() <= allowed, name


def exact(logit_scale, temperature=1.0):
    """Operands whose products are sums of small integers, exact in any order, so that what is left of an
    error is the epilogue's. Logits are near 1e4 and differ by a few; every second target is the largest."""
    g = torch.Generator("cpu").manual_seed(7)
    T, V, D = 24, 96, 16
    hidden = torch.randint(-1, 2, (T, D), generator=g, device="cpu").float()
    weight = torch.randint(-1, 2, (V, D), generator=g, device="cpu").float()
    hidden[:, 0], weight[:, 0] = 1024.0, 8.0 * logit_scale
    options = {"logit_scale": logit_scale * temperature * 9876.543 / 8192}
    options["temperature"] = temperature
    z = eager.head_logits(hidden.double(), weight.double(), **options)
    assert z.min() > 9e3 and z.max() < 1.1e4
    targets = torch.randint(V, (T,), generator=g, device="cpu")
    targets[::2] = z.argmax(1)[::2]
    return hidden.to(DEVICE), weight.to(DEVICE), targets.to(DEVICE), options


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("logit_scale", [1.0, -1.0])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("keeps", [False, True])
def test_one_frame_near_ten_thousand(keeps, temperature, logit_scale, dtype, poison):
    """Target, offset and sums are rounded in one place: 1e-6. Logits rounded before the offset is
    taken off, as they were, cost 7e-4, and so would a target in nats beside sums in powers of two."""
    hidden, weight, targets, options = exact(logit_scale, temperature)
    options["extras"] = EXTRAS
    truth = eager.linear_logp(hidden.double(), weight.double(), targets, **options)
    hidden, weight = hidden.to(dtype), weight.to(dtype).requires_grad_(keeps)
    got = linear_logp(hidden, weight, targets, implementation="triton", **options)
    for name in ("logp", "entropy", "log_sum_p2"):
        assert (getattr(got, name) - truth[name]).abs().max() <= 3e-6, name
    assert torch.equal(got.is_top1.bool(), truth["is_top1"].bool())


@pytest.mark.parametrize("logit_scale", [1.0, -1.0])
def test_one_frame_near_ten_thousand_with_a_bias(logit_scale, poison):
    hidden, weight, targets, options = exact(logit_scale)
    bias = torch.arange(96.0) % 5
    got = linear_logp(hidden, weight, targets, implementation="triton", bias=bias, **options)
    truth = eager.linear_logp(
        hidden.double(), weight.double(), targets, bias=bias.double(), **options
    )
    assert (got.logp - truth["logp"]).abs().max() <= 3e-6


def test_one_frame_under_a_cap_of_ten_thousand(poison):
    """tanh near 0.76: its own rounding, 1e4 times 6e-8, is what is left."""
    hidden, weight, targets, options = exact(1.0)
    options["softcap"] = 1e4
    got = linear_logp(hidden, weight, targets, implementation="triton", **options).logp
    truth = eager.linear_logp(hidden.double(), weight.double(), targets, **options)["logp"]
    same = eager.linear_logp(hidden, weight, targets, **options)["logp"]
    slack = 1e-3 if ON_A_GPU else 1e-4  # exp2 and a division, each to 2 ulp, in place of a tanh
    assert (got - truth).abs().max() <= 2 * (same - truth).abs().max() + slack


def sure(dtype):
    """Rows that are sure of their targets, all different, so that rounding decides about the last bit."""
    hidden, weight, _, _ = make(64, 200, 300, dtype)
    targets = torch.randperm(200, generator=torch.Generator("cpu").manual_seed(1), device="cpu")
    targets = targets[:64].to(DEVICE)
    weight[targets] += (hidden * (40.0 / 300)).to(dtype)
    return hidden, weight, targets


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("frozen", [False, True])
def test_a_log_prob_never_exceeds_0(dtype, frozen, poison):
    """The target's product is another sum than the tiles': rounding may put it above them."""
    hidden, weight, targets = sure(dtype)
    options = dataclasses.asdict(HeadOptions())
    sums = kernels.RowPass(hidden, weight, None, targets, options=options).sums
    assert (sums["shift"] > sums["total"].log2()).any(), "no row is put to the test"
    leaf, head = hidden.requires_grad_(), weight.requires_grad_(not frozen)
    logp = linear_logp(leaf, head, targets, implementation="triton").logp
    assert (logp <= 0).all() and (logp > -1e-4).all()
    logp.sum().backward()
    assert leaf.grad.abs().max() < 1e-3


def test_the_patch_at_the_target_is_never_positive(poison):
    hidden, weight, targets = sure(FP32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        linear_logp(
            hidden.requires_grad_(), weight.requires_grad_(), targets, implementation="triton"
        )
    (kept,) = [x for x in saved if x.shape == (64, 200)]
    at_target = kept[torch.arange(64), targets]
    assert (at_target <= 0).all() and (at_target == 0).any()


def test_masks_of_finite_size(poison):
    """A bias of -1e30, or fp32's lowest: tiles of such columns alone count as nothing."""
    for mask in (-1e9, -1e30, torch.finfo(FP32).min):
        hidden, weight, targets, bias = make(9, 170, 24, FP32, bias=True)
        bias[:64], bias[96:] = mask, mask
        targets = targets % 32 + 64
        inputs = (hidden, weight, targets, bias)
        extras = ("entropy", "log_sum_p2", "is_top1")
        got = evaluate(linear_logp, *inputs, extras=extras, implementation="triton")
        double = [x.double() if x.is_floating_point() else x for x in inputs]
        truth = evaluate(eager.linear_logp, *double, extras=extras)
        for name, value in truth.items():
            torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("extras", [(), EXTRAS])
def test_a_nan_stays_one(extras):
    """In a hidden state, hence in all its logits, or in the weight of one column."""
    hidden, weight, targets, _ = make(5, 70, 16, FP32)
    hidden[1, 3] = torch.nan
    logp = linear_logp(hidden, weight, targets, implementation="triton", extras=extras).logp
    assert logp.isnan().tolist() == [False, True, False, False, False]
    weight[60] = torch.nan
    logp = linear_logp(hidden, weight, targets, implementation="triton", extras=extras).logp
    assert logp.isnan().all()


@pytest.mark.parametrize("keeps", [False, True])
def test_logits_of_ten_billion(keeps):
    """fp32 tells neither the largest logit from its offset nor logits 100 apart: finite, and one-hot."""
    hidden, weight = torch.zeros(3, 8), torch.zeros(100, 8)
    hidden[:, 0], weight[:, 0], weight[17, 0] = 1.0, 1e9, 1e10
    targets = torch.tensor([17, 17, 3])
    inputs = hidden.requires_grad_(), weight.requires_grad_(keeps), targets
    logp = linear_logp(*inputs, implementation="triton").logp
    assert (logp[:2] > -1e-6 * 1e10).all() and (logp <= 0).all()
    torch.testing.assert_close(logp[2].item(), -9e9, rtol=1e-6, atol=0)
    logp.sum().backward()
    assert hidden.grad.isfinite().all()


def test_a_target_of_another_shard():
    """No shift here, and the sums are those of the columns that are here."""
    hidden, weight, targets, _ = make(12, 70, 16, FP32)
    options = {"options": dataclasses.asdict(HeadOptions()), "extras": EXTRAS}
    here = kernels.RowPass(hidden, weight, None, targets, **options).sums
    elsewhere = targets.clone()
    elsewhere[3], elsewhere[4], elsewhere[5] = -1, 70, 2**40
    found = kernels.RowPass(hidden, weight, None, elsewhere, **options).sums
    for name in ("shift", "top"):
        assert (found[name][3:6] == -torch.inf).all()
        assert torch.equal(found[name][6:], here[name][6:])
    for name in ("maximum", "total", "weighted", "squares", "offset"):
        assert torch.equal(found[name], here[name])


def test_log_prob_of_minus_500(schedule, poison):
    """The row's maximum is 500 above its offset: found, and done again against the maximum."""
    hidden = torch.ones(9, 4)
    weight = torch.zeros(300, 4)
    weight[7] = 125.0  # its logit is 500, all others are 0; the sample takes every second column
    targets = torch.tensor([0, 7, 39, 1, 2, 3, 4, 5, 299])
    got = evaluate(linear_logp, hidden, weight, targets, None, implementation="triton")
    expected = torch.tensor([-500.0, 0.0] + [-500.0] * 7).double()
    # An ulp of 721.3 / ln 2; and at 0 those of exp2 and log near 1, which a GPU takes to 2 ulp.
    torch.testing.assert_close(got["logp"], expected, rtol=2**-23, atol=2**-21)
    slopes = torch.linspace(-1, 2, 9).double()
    expected = -(slopes.sum() - slopes[1])
    torch.testing.assert_close(got["dW"][7], expected.expand(4), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got["dW"][0], slopes[0].expand(4), rtol=1e-6, atol=1e-6)


@pytest.mark.emulator
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_some_rows_leave_their_range(dtype, frozen, poison):
    """Every third row has a peak that neither its target nor the sample shows; the others keep theirs,
    bit for bit."""
    hidden, weight, targets, _ = make(40, 600, 24, dtype)
    targets = targets.clamp(max=590) // 2 * 2
    quiet = (hidden.clone(), weight.clone(), targets, None)
    weight[595] = 0.0  # 600 columns: the sample takes every third, and 595 is none of them
    weight[595, 0] = 60.0
    hidden[:, 0] = 0.0
    quiet = (hidden.clone(), weight, targets, None)
    hidden[::3, 0] = 3.0
    inputs = (hidden, weight, targets, None)
    double = (hidden.double(), weight.double(), targets, None)

    def run(hidden, weight, targets, bias, function=linear_logp, **options):
        leaf = hidden.clone().requires_grad_()
        head = weight.clone().requires_grad_(not frozen)
        result = function(leaf, head, targets, **options)
        logp = result["logp"] if isinstance(result, dict) else result.logp
        logp.backward(torch.linspace(-1, 2, 40).to(logp.dtype))
        grads = {"dH": leaf.grad} | ({} if frozen else {"dW": head.grad})
        return {k: v.detach().double() for k, v in ({"logp": logp} | grads).items()}

    got, same = run(*inputs, implementation="triton"), run(*inputs, function=eager.linear_logp)
    truth = run(*double, function=eager.linear_logp)
    assert truth["logp"][::3].max() < -100 < truth["logp"][1::3].min()
    assert_as_good_as_eager(got, same, truth, dtype)
    calm = run(*quiet, implementation="triton")
    rows = torch.arange(40) % 3 != 0
    assert torch.equal(got["logp"][rows], calm["logp"][rows])
    assert torch.equal(got["dH"][rows], calm["dH"][rows])


def test_saturated_soft_cap_stays_finite(poison):
    hidden, weight, targets, _ = make(6, 50, 8, FP32, spread=1e5)
    weight[0] = 0.0
    got = evaluate(linear_logp, hidden, weight, targets, None, implementation="triton", softcap=2.0)
    double = (hidden.double(), weight.double(), targets, None)
    truth = evaluate(eager.linear_logp, *double, softcap=2.0)
    for name in truth:
        torch.testing.assert_close(got[name], truth[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", ["rows apart", "transposed", "one row repeated"])
def test_strides(layout, poison):
    hidden, weight, targets, _ = make(19, 67, 40, FP32)
    views = {
        "rows apart": (torch.cat([hidden, hidden], 1)[:, :40], weight),
        "transposed": (hidden.t().contiguous().t(), weight.t().contiguous().t()),
        "one row repeated": (hidden[:1].expand(19, 40), weight),
    }
    h, w = views[layout]
    assert not h.is_contiguous()
    got = evaluate(linear_logp, h, w, targets, None, implementation="triton")
    contiguous = (h.contiguous(), w.contiguous(), targets, None)
    expected = evaluate(linear_logp, *contiguous, implementation="triton")
    for name, value in expected.items():
        # A transposed weight may be another product of the library's: dH is summed in another order.
        torch.testing.assert_close(got[name], value, rtol=1e-6, atol=5e-7)


def test_row_offsets_beyond_32_bits():
    """Rows 2^30 + 1 elements apart: the third starts beyond 2^31. Untouched pages are free."""
    stride = 2**30 + 1
    try:
        memory = torch.empty(2 * stride + 8, dtype=FP16)
    except RuntimeError:
        pytest.skip("no 4 GiB of address space")
    apart = memory.as_strided((3, 8), (stride, 1))
    hidden, weight, targets, _ = make(3, 40, 8, FP16)
    apart.copy_(hidden)
    options = dataclasses.asdict(HeadOptions())
    got = kernels.RowPass(apart, weight, None, targets, options=options).sums
    expected = kernels.RowPass(hidden, weight, None, targets, options=options).sums
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-6, atol=1e-6)


def test_same_bits_every_time_and_in_every_batch():
    """Tiles depend on D and V alone, so a token's log-prob does not depend on its neighbours."""
    hidden, weight, targets, _ = make(37, 131, 70, BF16)
    first = evaluate(linear_logp, hidden, weight, targets, None, implementation="triton")
    again = evaluate(linear_logp, hidden, weight, targets, None, implementation="triton")
    for name, value in first.items():
        assert torch.equal(again[name], value), name
    whole = linear_logp(hidden, weight, targets, implementation="triton").logp
    alone = linear_logp(hidden[20:23], weight, targets[20:23], implementation="triton").logp
    assert torch.equal(alone, whole[20:23])


@needs_interpreter  # with tiles that no device has in its table
def test_tile_sizes_and_descriptors_change_rounding_only():
    """Through pointers and descriptors, one program per tile and persistent, in groups of 1 to 3."""
    hidden, weight, targets, _ = make(37, 288, 24, FP32, spread=4.0)
    options = dataclasses.asdict(HeadOptions(temperature=0.8))
    runs = []
    for config in (
        tiles.TileConfig(16, 32, 32, 1, 1, group_t=1),
        tiles.TileConfig(16, 32, 16, 1, 1, group_t=2, tma=True),
        tiles.TileConfig(32, 64, 32, 1, 1, group_t=3, per_sm=3, tma=True),
        tiles.TileConfig(64, 16, 32, 1, 1, group_t=3, per_sm=5),
    ):
        kept = torch.full((37, 288), torch.nan)
        offset = torch.linspace(-3, 3, 37)
        extras = {"options": options, "extras": EXTRAS, "config": config}
        sums = kernels.RowPass(hidden, weight, None, targets, **extras).sums
        more = kernels.RowPass(
            hidden, weight, None, targets, offset_T=offset, kept_TV=kept, **extras
        ).sums
        runs.append({**sums, **{f"{k} against the offset": v for k, v in more.items()}, "E": kept})
    assert len(runs[0]) == 19
    for run in runs[1:]:
        for name, value in runs[0].items():
            torch.testing.assert_close(run[name], value, rtol=1e-5, atol=1e-4)
    z = eager.head_logits(hidden.double(), weight.double(), temperature=0.8)
    expected = (z - offset[:, None] * math.log(2)).exp()
    torch.testing.assert_close(runs[0]["E"].double(), expected, rtol=1e-5, atol=1e-6)


def test_what_is_saved_is_what_the_plan_says():
    hidden, weight, targets, _ = make(9, 40, 8, FP32)
    for budget, kept in ((0, 0), (1 << 20, 9 * 48)):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):  # noqa: B023
            linear_logp(
                hidden.requires_grad_(),
                weight.requires_grad_(),
                targets,
                implementation="triton",
                workspace_bytes=budget,
            )
        bytes_saved = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in saved}
        inputs = {x.untyped_storage().data_ptr() for x in (hidden, weight, targets)}
        own = sum(size for pointer, size in bytes_saved.items() if pointer not in inputs)
        assert own == 4 * (kept + 2 * 9)  # exponentials, and offset and total of each token


def test_launchers_refuse_what_they_cannot_run():
    hidden, weight, targets, _ = make(4, 10, 8, FP32)
    with pytest.raises(ValueError, match="do not fit"):
        kernels.RowPass(hidden, weight[:, :4], None, targets, options={})
    with pytest.raises(ValueError, match="fp64|float64"):
        kernels.RowPass(hidden.double(), weight.double(), None, targets, options={})
