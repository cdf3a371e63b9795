"""The CUDA implementation of `linear_logp` against its definition in fp64.

On an sm_90 GPU: `TRITON_INTERPRET=0 pytest tests/ops/test_linear_logp_cuda.py`. Elsewhere the same sources
run in the emulation of csrc/emulator, on small shapes, through the whole of `linear_logp`.
"""

import contextlib
import dataclasses
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_fast.errors import UnavailableError
from dpo_fast.ops import dispatch, eager, linear_logp
from dpo_fast.ops.linear_logp import cuda_extension, op
from dpo_fast.ops.linear_logp.call import EXTRAS, HeadOptions
from tests.support import device, emulated_sm90
from tests.support.device import DEVICE

kernels = pytest.importorskip("dpo_fast.kernels.linear_logp")
from dpo_fast.ops.linear_logp import cuda as ops  # noqa: E402 it imports triton

ON_A_GPU = device.ON_A_GPU and torch.cuda.get_device_capability() == (9, 0)
OBSTACLE = cuda_extension.why_not() if ON_A_GPU else emulated_sm90.why_not()
if not ON_A_GPU and not device.INTERPRETED:
    OBSTACLE = "needs an sm_90 GPU, or TRITON_INTERPRET=1 for the emulation"
pytestmark = [
    pytest.mark.skipif(OBSTACLE is not None, reason=str(OBSTACLE)),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
BF16 = torch.bfloat16
OPTIONS = {"logit_scale": -0.7, "temperature": 1.3}
run = partial(linear_logp, implementation="cuda")


@pytest.fixture(autouse=True, scope="module")
def operations(on_the_device):
    """A GPU's operations, or their emulation on a device of 4 multiprocessors."""
    with pytest.MonkeyPatch.context() as patch:
        if not ON_A_GPU:
            patch.setattr(cuda_extension, "operations", emulated_sm90.emulated)
            patch.setattr(ops, "_multiprocessors", lambda device: 4)
            patch.setattr(dispatch, "why_not_cuda", lambda *_: None)
        dispatch._logged_choice.cache_clear()
        yield
    dispatch._logged_choice.cache_clear()


def make(T, V, D, *, spread=1.0):
    """Hidden, weight and targets, with logits of standard deviation `spread`."""
    g = torch.Generator("cpu").manual_seed(T + V + D)
    randn = partial(torch.randn, generator=g, device="cpu")
    hidden, weight = randn(T, D).to(DEVICE, BF16), (randn(V, D) * spread / D**0.5).to(DEVICE, BF16)
    targets = torch.randint(V, (T,), generator=g, device="cpu").to(DEVICE)
    if T:
        targets[0], targets[-1] = 0, V - 1  # both ends of the vocabulary
    return hidden, weight, targets


def evaluate(function, hidden, weight, targets, *, frozen=False, **options):
    """Outputs and gradients by name, in fp64, for fixed slopes dL/dlogp of both signs."""
    leaves = {"dH": hidden.detach().requires_grad_(), "dW": weight.detach()}
    if not frozen:
        leaves["dW"].requires_grad_()
    result = function(leaves["dH"], leaves["dW"], targets, **options)
    result = result if isinstance(result, dict) else result._asdict()
    slopes = torch.linspace(-1, 2, len(targets)).to(result["logp"].dtype)
    wanted = {name: x for name, x in leaves.items() if x.requires_grad}
    found = torch.autograd.grad(result["logp"], list(wanted.values()), slopes)
    result = {k: v.detach() for k, v in result.items() if v is not None}
    return {k: v.double() for k, v in (result | dict(zip(wanted, found))).items()}


def check(T, V, D, *, budget=1 << 30, spread=1.0, frozen=False, **options):
    """No further from fp64 than twice the same mathematics in bf16 with fp32 logits, plus slack."""
    inputs = make(T, V, D, spread=spread)
    double = (inputs[0].double(), inputs[1].double(), inputs[2])
    got = evaluate(run, *inputs, frozen=frozen, workspace_bytes=budget, **options)
    same = evaluate(eager.linear_logp, *inputs, frozen=frozen, **options)
    truth = evaluate(eager.linear_logp, *double, frozen=frozen, **options)
    assert got.keys() == truth.keys()
    for name, true in truth.items():
        assert got[name].shape == true.shape
        if not true.numel():
            continue
        error, allowed = (got[name] - true).abs(), (same[name] - true).abs().max()
        # A frozen head's gradient is rounded before it is scaled, and once more after it.
        slack = (1 + frozen) * 2**-8 if name.startswith("d") else 1e-6
        allowed = 2 * allowed + slack * true.abs().max() + 4e-6 * max(1.0, spread)
        index = error.argmax().item()
        values = [x.flatten()[index].item() for x in (got[name], same[name], true)]
        assert error.max() <= allowed, (
            f"{name}[{index}]: got, eager, truth = {values}; {allowed:.3g}"
        )


SHAPES = [
    (0, 200, 8),  # nothing to score
    (1, 1, 8),  # the smallest of everything: p = 1 and every gradient is 0
    (1, 500, 72),  # one token; V and D are no multiples of a tile
    (128, 192, 64),  # one whole tile
    (256, 384, 128),  # whole tiles, a cluster of two
    (300, 601, 200),  # three tiles of tokens: without a cluster; ragged everywhere
    (130, 1000, 520),  # a cluster whose second tile is nearly empty; more steps than stages
]
if ON_A_GPU:
    SHAPES += [(1000, 32_001, 896), (257, 40_009, 1536), (4500, 8_009, 264)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_definition(shape, poison):
    check(*shape)


@settings(max_examples=15, deadline=None)
@given(
    T=st.integers(1, 300),
    V=st.integers(1, 700),
    eighths=st.integers(1, 30),
    frozen=st.booleans(),
    budget=st.sampled_from([0, 1 << 30]),
    extras=st.sampled_from([(), EXTRAS]),
    options=st.sampled_from([{}, OPTIONS, {"logit_scale": 0.1}]),
    multiprocessors=st.integers(1, 6),
)
def test_any_shape(T, V, eighths, frozen, budget, extras, options, multiprocessors):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "_multiprocessors", lambda device: multiprocessors)
        check(T, V, 8 * eighths, frozen=frozen, budget=budget, extras=extras, **options)


@pytest.mark.parametrize("spread", [0.1, 10.0])
def test_logit_scale_temperature_and_extras(spread, poison):
    check(150, 400, 72, spread=spread, extras=EXTRAS, **OPTIONS)


@pytest.mark.parametrize("extra", EXTRAS)
def test_each_extra_alone(extra, poison):
    check(40, 250, 24, extras=(extra,))


SCHEDULES = {
    "recompute, tokens first": {"schedule": "recompute", "kept_tokens": 0, "tokens_first": True},
    "recompute, vocabulary first": {
        "schedule": "recompute",
        "kept_tokens": 0,
        "tokens_first": False,
    },
    "mixed, tokens first": {"schedule": "mixed", "kept_tokens": 160, "tokens_first": True},
    "mixed, residual, vocabulary first": {
        "schedule": "mixed",
        "kept_tokens": 16,
        "tokens_first": False,
        "residual_sums": True,
    },
}


@contextlib.contextmanager
def forced(columns):
    """Every trainable call runs this schedule, in tiles of 144 x 208 and passes of at most 144 tokens."""
    plan_call = op.plan_call

    def plan(*arguments):
        return dataclasses.replace(
            plan_call(*arguments), **columns, token_chunk=144, vocab_block=208
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(op, "plan_call", plan)
        patch.setattr(ops.triton, "CHUNK_TOKENS", 144)
        yield


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule(name, poison):
    with forced(SCHEDULES[name]):
        check(300, 450, 40, **OPTIONS)


@pytest.mark.parametrize("budget", [0, 1 << 30])
def test_frozen_head(budget, poison):
    """Exponentials times the weight chunk by chunk, and with no workspace gradient tiles."""
    check(200, 450, 40, frozen=True, budget=budget, **OPTIONS)


def test_rows_that_leave_their_range(poison):
    """Every third row has a peak that neither its target nor the sample shows; the others keep their
    bits, those in the same unit too."""
    hidden, weight, targets = make(300, 600, 24)
    targets = targets.clamp(max=590) // 2 * 2
    weight[595] = 0.0  # 600 columns: the sample takes every third, and 595 is none of them
    weight[595, 0] = 60.0
    hidden[:, 0] = 0.0
    calm = evaluate(run, hidden, weight, targets)
    hidden[:128:3, 0] = 3.0  # nothing to repair in the other tiles
    got = evaluate(run, hidden, weight, targets)
    truth = evaluate(eager.linear_logp, hidden.double(), weight.double(), targets)
    assert truth["logp"][:128:3].max() < -100 < truth["logp"][1::3].min()
    torch.testing.assert_close(got["logp"], truth["logp"], rtol=1e-6, atol=1e-5)
    for name in ("dH", "dW"):
        size = truth[name].abs().max()
        assert (got[name] - truth[name]).abs().max() <= 2**-7 * size, name
    rows = torch.ones(300, dtype=torch.bool)
    rows[:128:3] = False
    assert torch.equal(got["logp"][rows], calm["logp"][rows])
    assert torch.equal(got["dH"][rows], calm["dH"][rows])


@pytest.mark.parametrize("logit_scale", [1.0, -1.0])
@pytest.mark.parametrize("keeps", [False, True])
def test_one_frame_near_ten_thousand(keeps, logit_scale, poison):
    """As the test of that name of the Triton twin: products that are exact, and 1e-6 is left."""
    g = torch.Generator("cpu").manual_seed(7)
    hidden = torch.randint(-1, 2, (130, 16), generator=g, device="cpu").to(DEVICE, BF16)
    weight = torch.randint(-1, 2, (200, 16), generator=g, device="cpu").to(DEVICE, BF16)
    hidden[:, 0], weight[:, 0] = 1024.0, 8.0 * logit_scale
    options = {"logit_scale": logit_scale * 9876.543 / 8192, "extras": EXTRAS}
    targets = torch.randint(200, (130,), generator=g, device="cpu").to(DEVICE)
    found = run(hidden, weight.requires_grad_(keeps), targets, **options)
    truth = eager.linear_logp(hidden.double(), weight.double(), targets, **options)
    for name in ("logp", "entropy", "log_sum_p2"):
        assert (getattr(found, name) - truth[name]).abs().max() <= 3e-6, name
    assert torch.equal(found.is_top1.bool(), truth["is_top1"].bool())


def test_log_prob_of_minus_500(poison):
    """The row's maximum is 500 above its offset, which takes a repair."""
    hidden, weight = torch.ones(130, 8, dtype=BF16), torch.zeros(600, 8, dtype=BF16)
    weight[7] = 62.5  # its logit is 500, all others are 0; the sample takes every third column
    targets = torch.arange(130)
    logp = run(hidden, weight.requires_grad_(), targets).logp
    expected = torch.full((130,), -500.0)
    expected[7] = 0.0
    # An ulp of 500; and at 0 those of exp2 and log near 1, which a GPU takes to 2 ulp.
    torch.testing.assert_close(logp, expected, rtol=2**-23, atol=2**-21)


def test_a_tile_far_below_the_others():
    """Its exponentials are 0 against the row's maximum, and so is what it adds to the entropy."""
    hidden, weight = torch.zeros(2, 8, dtype=BF16), torch.zeros(400, 8, dtype=BF16)
    hidden[:, 0], weight[:192, 0] = 1.0, -2e38
    targets = torch.tensor([200, 399])
    got = run(hidden, weight, targets, extras=("entropy", "log_sum_p2"))
    truth = eager.linear_logp(
        hidden.double(), weight.double(), targets, extras=("entropy", "log_sum_p2")
    )
    for name, value in truth.items():
        torch.testing.assert_close(getattr(got, name).double(), value, rtol=1e-6, atol=1e-6)


def test_same_bits_whatever_the_grid_and_the_batch():
    """One block or many, clusters or none, alone or among others."""
    hidden, weight, targets = make(300, 601, 136)
    options = dataclasses.asdict(HeadOptions())
    found = []
    for T, launch in ((300, (1, 1)), (300, (2, 2)), (300, (2, 4)), (300, (1, 4)), (130, (2, 2))):
        with pytest.MonkeyPatch.context() as patch:
            tiles_t = -(-T // ops.sizes()["kBlockT"])
            units_t, tiles_v = -(-tiles_t // launch[0]), -(-601 // ops.sizes()["kBlockV"])
            patch.setattr(
                ops,
                "plan_launch",
                lambda *_: ops.Launch(*launch, units_t, tiles_v),  # noqa: B023
            )
            part = ops.row_pass(
                hidden[:T], weight, None, targets[:T], options=options, extras=EXTRAS
            )
        found.append({name: x[:130] for name, x in part.sums.items()})
    for other in found[1:]:
        for name, value in found[0].items():
            assert torch.equal(other[name], value), name


def test_sums_and_exponentials_are_those_of_the_triton_twin():
    hidden, weight, targets = make(70, 260, 40, spread=4.0)
    targets[5], targets[6] = -3, 260  # of another shard: no target of these columns
    arguments = {"options": dataclasses.asdict(HeadOptions(**OPTIONS)), "extras": EXTRAS[:2]}
    offset = torch.linspace(-3, 3, 70)
    for keep in (False, True):
        sums = []
        for row_pass in (ops.row_pass, kernels.RowPass):
            room = torch.zeros(70, 272, dtype=BF16)[:, :260]
            kept = {"offset_T": offset, "kept_TV": room} if keep else {}
            done = row_pass(hidden, weight, None, targets, **arguments, **kept)
            sums.append(done.sums | ({"E": room} if keep else {}))
        del sums[1]["logp"]  # csrc leaves that to PyTorch
        assert sums[0].keys() == sums[1].keys()
        assert sums[0]["shift"][5:7].tolist() == [-torch.inf, -torch.inf]
        for name, value in sums[1].items():
            slack = 2**-7 if name == "E" else 1e-4  # bf16 may round to the other side
            torch.testing.assert_close(sums[0][name], value, rtol=slack, atol=1e-4)


def test_row_offsets_beyond_32_bits():
    """Rows 2^30 + 8 elements apart: the third starts beyond 2^31. Untouched pages are free."""
    stride = 2**30 + 8
    try:
        memory = torch.empty(2 * stride + 8, dtype=BF16)
    except RuntimeError:
        pytest.skip("no 4 GiB of memory")
    apart = memory.as_strided((3, 8), (stride, 1))
    hidden, weight, targets = make(3, 40, 8)
    apart.copy_(hidden)
    options = dataclasses.asdict(HeadOptions())
    got = ops.row_pass(apart, weight, None, targets, options=options).sums
    expected = ops.row_pass(hidden, weight, None, targets, options=options).sums
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": torch.zeros(20, dtype=BF16)}, "bias of 20 elements.*implementation='triton'"),
        ({"softcap": 30.0}, "softcap=30.0: a soft cap is not served"),
        # By the choice on a GPU, by the schedule in the emulation.
        (
            {"dtype": torch.float16},
            "bfloat16, not torch.float16|torch.float16: torch.bfloat16 alone",
        ),
        ({"D": 36}, r"hidden \(6, 36\) with strides \(36, 1\).*multiple of 8"),
        ({"transposed": True}, r"weight \(20, 40\) with strides \(1, 20\)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_not_served_is_named(change, message):
    change = dict(change)
    hidden, weight, targets = make(6, 20, change.pop("D", 40))
    dtype = change.pop("dtype", BF16)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    if change.pop("transposed", False):
        weight = weight.t().contiguous().t()
    if "bias" in change:
        change["bias"] = change["bias"].to(DEVICE)
    with pytest.raises(UnavailableError, match=message):
        run(hidden, weight, targets, **change)
