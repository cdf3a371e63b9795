"""The Triton implementation of `linear_logp`, interpreted, against its definition in fp64."""

import itertools

import pytest
import torch

from dpo_fast.ops import eager, linear_logp, plan
from dpo_fast.ops.implementation import interpreting
from dpo_fast.ops.linear_logp import EXTRAS
from dpo_fast.ops.linear_logp_triton import tiles_for

kernels = pytest.importorskip("dpo_fast.kernels.linear_logp")
pytestmark = [
    pytest.mark.skipif(not interpreting(), reason="needs TRITON_INTERPRET=1"),
    # numpy warns where padding rows and masked logits meet infinities; the results are checked.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
# g is rounded once to the operands' dtype before its product; eager's fp32 logits are not.
SLACK = {FP32: 1e-6, FP16: 2**-11, BF16: 2**-8}
OPTIONS = {"logit_scale": -0.7, "softcap": 5.0, "temperature": 1.3}


def make(T, V, D, dtype, *, bias=False, spread=1.0):
    """Hidden, weight, targets and bias, with logits of standard deviation `spread`."""
    g = torch.Generator().manual_seed(T + V + D)
    hidden = torch.randn(T, D, generator=g).to(dtype)
    weight = (torch.randn(V, D, generator=g) * spread / D**0.5).to(dtype)
    targets = torch.randint(V, (T,), generator=g)
    if T:
        targets[0], targets[-1] = 0, V - 1  # both ends of the vocabulary
    return hidden, weight, targets, torch.randn(V, generator=g).to(dtype) if bias else None


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


def assert_as_good_as_eager(got, same, truth, dtype):
    """No further from fp64 than twice the same mathematics in the same dtype, plus slack."""
    for name, true in truth.items():
        if not true.numel():
            assert got[name].shape == true.shape
            continue
        error, allowed = (got[name] - true).abs(), (same[name] - true).abs().max()
        slack = SLACK[dtype] if name.startswith("d") else 1e-6
        allowed = 2 * allowed + slack * true.abs().max()
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
    assert_as_good_as_eager(got, same, evaluate(eager.linear_logp, *double, **options), dtype)


SHAPES = [  # the interpreter's tiles are 16 x 32 x 32
    (0, 33, 8),  # nothing to score
    (1, 1, 1),  # the smallest of everything: p = 1 and every gradient is 0
    (1, 131, 40),  # one token; V and D are no multiples of a block
    (16, 64, 32),  # whole tiles
    (37, 131, 70),  # primes: ragged tiles everywhere
]


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


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_several_tiles_and_either_order(dtype, monkeypatch, poison):
    """Sums over chunks and blocks: tiles of 16 x 32, tokens first and vocabulary first."""
    from dpo_fast.ops import linear_logp_triton as ops

    for tokens_first in (True, False):
        tiles = ops.Tiles(16, 32, tokens_first)
        monkeypatch.setattr(ops, "tiles_for", lambda *_, tiles=tiles, **__: tiles)
        check(37, 75, 24, dtype, bias=True)


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


def test_log_prob_of_minus_500(poison):
    hidden = torch.ones(3, 4)
    weight = torch.zeros(40, 4)
    weight[7] = 125.0  # its logit is 500, all others are 0
    targets = torch.tensor([0, 7, 39])
    got = evaluate(linear_logp, hidden, weight, targets, None, implementation="triton")
    assert got["logp"].tolist() == [-500.0, 0.0, -500.0]
    assert torch.equal(got["dW"][7], torch.full((4,), 1.0 - 2.0).double())  # -(c_0 + c_2)


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
        torch.testing.assert_close(got[name], value, rtol=1e-6, atol=1e-7)


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
    got = kernels.statistics(apart, weight, None, targets)
    assert torch.equal(got["logp"], kernels.statistics(hidden, weight, None, targets)["logp"])


def test_same_bits_every_time_and_in_every_batch():
    """Splits depend on V alone, so a token's log-prob does not depend on its neighbours."""
    hidden, weight, targets, _ = make(37, 131, 70, BF16)
    first = evaluate(linear_logp, hidden, weight, targets, None, implementation="triton")
    again = evaluate(linear_logp, hidden, weight, targets, None, implementation="triton")
    for name, value in first.items():
        assert torch.equal(again[name], value), name
    alone = linear_logp(hidden[20:23], weight, targets[20:23], implementation="triton").logp
    assert torch.equal(alone.double(), first["logp"][20:23])


def test_number_of_splits_changes_rounding_only(monkeypatch):
    hidden, weight, targets, _ = make(9, 290, 24, FP32, spread=4.0)
    runs = []
    for splits in (1, 2, 3, 32):
        monkeypatch.setattr(kernels, "MAX_SPLITS", splits)
        runs.append(kernels.statistics(hidden, weight, None, targets, extras=EXTRAS))
    for run, name in itertools.product(runs[1:], runs[0]):
        torch.testing.assert_close(run[name], runs[0][name], rtol=2e-6, atol=2e-6)


def test_forward_keeps_one_number_a_token():
    hidden, weight, targets, _ = make(9, 40, 8, FP32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        linear_logp(hidden.requires_grad_(), weight.requires_grad_(), targets,
                    implementation="triton")  # fmt: skip
    assert max(x.numel() for x in saved) <= weight.numel()  # and nothing of shape [T, V]


@pytest.mark.parametrize("T", [1, 100, 8192, 1_000_000])  # tiny, ragged, a step, a long context
@pytest.mark.parametrize("budget", [0, 1 << 24, 1 << 30])
@pytest.mark.parametrize("needs", [(True, False), (False, True), (True, True)])
def test_tiles_stay_within_the_budget(T, budget, needs):
    V, D = 151_936, 4096
    chosen = plan(
        T, V, D, BF16, needs_hidden=needs[0], needs_head=needs[1], workspace_bytes=budget,
        keeps=False,
    )  # fmt: skip
    tiles = tiles_for(T, V, 2, chosen, needs_hidden=needs[0], needs_weight=needs[1])
    assert 2 * tiles.token_chunk * tiles.vocab_block <= max(budget, 1 << 20)
    if T < 1_000_000:
        pairs = tiles.pairs(T, V)
        assert sum((r.stop - r.start) * (c.stop - c.start) for r, c in pairs) == T * V


def test_configurations_do_not_depend_on_the_batch():
    """The table is keyed by architecture and bins; unknown architectures get one that fits any."""
    wide = kernels.config_for("sm_90", BF16, 4096, 128_256)
    assert wide.block_v == 256
    assert kernels.config_for("sm_90", BF16, 4096, 128_256, rich=True) == kernels.RICH_HALF
    assert kernels.config_for("sm_90", FP32, 4096, 128_256) == kernels.FLOAT
    assert kernels.config_for("sm_86", FP16, 4096, 128_256) == kernels.OTHER_HALF
    assert kernels.config_for("hip", BF16, 4096, 128_256, rich=True) == kernels.OTHER_HALF


def test_launchers_refuse_what_they_cannot_run():
    hidden, weight, targets, _ = make(4, 10, 8, FP32)
    with pytest.raises(ValueError, match="do not fit"):
        kernels.statistics(hidden, weight[:, :4], None, targets)
    with pytest.raises(ValueError, match="fp64|float64"):
        kernels.statistics(hidden.double(), weight.double(), None, targets)
