"""The torch implementation of `linear_logp` against its definition in fp64."""

import importlib
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from dpo_fast.ops import cpu, eager, linear_logp, plan
from dpo_fast.ops.linear_logp import plan as plans
from dpo_fast.ops.linear_logp.call import EXTRAS

BUDGETS = {"keep": 1 << 30, "mixed": None, "recompute": 0}  # None: room for a third of the tokens


def make(T, V, D, dtype, *, bias=False, seed=0, spread=1.0):
    """Hidden, weight, bias and targets, with logits of standard deviation `spread`."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(T, D, generator=g).to(dtype)
    weight = (torch.randn(V, D, generator=g) * spread / D**0.5).to(dtype)
    targets = torch.randint(V, (T,), generator=g)
    if T:
        targets[0], targets[-1] = 0, V - 1  # both ends of the vocabulary
    return hidden, weight, torch.randn(V, generator=g).to(dtype) if bias else None, targets


def gradients(function, hidden, weight, targets, bias, slopes, **options):
    """logp and the gradients of sum(slopes * logp), and the extras."""
    leaves = [x.detach().requires_grad_() for x in (hidden, weight, bias) if x is not None]
    result = function(*leaves[:2], targets, bias=leaves[2] if bias is not None else None, **options)
    result = result if isinstance(result, dict) else result._asdict()
    result["logp"].backward(slopes.to(result["logp"].dtype))
    return result, [leaf.grad for leaf in leaves]


def assert_as_good_as_eager(got, eager_value, truth, what, slack, terms, logit):
    """No further from the fp64 truth than twice the same mathematics in the same dtype, plus slack: in
    units of the `terms` that it is a sum of, which may cancel, and of the largest logit, whose
    rounding exponentials inherit."""
    size = truth.abs().max().item() if truth.numel() else 0.0
    error = (got.double() - truth).abs()
    allowed = 2 * (eager_value.double() - truth).abs().max().item() if truth.numel() else 0.0
    allowed += slack * max(size, terms) + 1e-6 * terms * logit
    if error.numel() and not error.max() <= allowed:
        index = error.flatten().argmax().item()
        values = [x.flatten()[index].item() for x in (got, eager_value, truth)]
        pytest.fail(f"{what}[{index}]: got, eager, truth = {values}; allowed error {allowed}")


def laid_out(matrix, layout):
    """The same values in other strides."""
    if layout == "transposed":
        return matrix.t().contiguous().t()
    rows, columns = matrix.shape
    if layout == "rows apart":
        return torch.cat([matrix, matrix], 1)[:, :columns]
    if layout == "every second column":
        return torch.stack([matrix, matrix], 2).view(rows, 2 * columns)[:, ::2]
    return matrix


def check(
    T, V, D, dtype, budget, *, bias=False, seed=0, spread=1.0, layout="contiguous", **options
):
    hidden, weight, bias_V, targets = make(T, V, D, dtype, bias=bias, seed=seed, spread=spread)
    hidden, weight = laid_out(hidden, layout), laid_out(weight, layout)
    slopes = torch.randn(T, generator=torch.Generator().manual_seed(1))
    if budget is None:
        budget = T // 3 * V * dtype.itemsize
    options = dict(options, extras=EXTRAS)
    got, grads = gradients(
        linear_logp,
        hidden,
        weight,
        targets,
        bias_V,
        slopes,
        implementation="torch",
        workspace_bytes=budget,
        **options,
    )
    double = [None if x is None else x.double() for x in (hidden, weight, bias_V)]
    same, same_grads = gradients(
        eager.linear_logp, hidden, weight, targets, bias_V, slopes, **options
    )
    truth, true_grads = gradients(
        eager.linear_logp, *double[:2], targets, double[2], slopes, **options
    )
    head = {k: v for k, v in options.items() if k != "extras"}
    logits = eager.head_logits(*double[:2], double[2], **head)
    largest_logit = max(1.0, logits.abs().max().item() if T else 0.0)
    for name in ("logp", "entropy", "log_sum_p2", "mean_logit"):
        assert got[name].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        # The entropy is a difference of two sums that can be 8 nats larger than it is.
        slack = 1e-5 if name == "entropy" else 2e-6
        assert_as_good_as_eager(got[name], same[name], truth[name], name, slack, 1.0, largest_logit)
    assert torch.equal(got["is_top1"], same["is_top1"])
    # Kept exponentials are rounded to the operand's dtype where eager's gradient tile is; a bf16
    # product has no fp32 output on a CPU, which costs one more rounding.
    slack = 2e-6 if dtype in (torch.float32, torch.float64) else 2 * torch.finfo(dtype).eps
    largest = [x.abs().max().item() if x.numel() else 0.0 for x in (slopes, weight, hidden)]
    largest[0] *= abs(options.get("logit_scale", 1.0)) / options.get("temperature", 1.0)
    terms = {"hidden": largest[0] * largest[1], "weight": largest[0] * largest[2] * (1 + T**0.5)}
    for name, a, b, c in zip(("hidden", "weight", "bias"), grads, same_grads, true_grads):
        assert a.dtype == dtype
        size = terms.get(name, largest[0])
        assert_as_good_as_eager(a, b, c, f"d{name}", slack, size, largest_logit)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", BUDGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_forward_and_gradients(schedule, dtype, poison):
    # 2,500 tokens: more than one token chunk; 3,001 columns: more than one block, no multiple of 64
    check(2500, 3001, 24, dtype, BUDGETS[schedule])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("budget", [0, None])
def test_tokens_in_groups(budget, dtype, poison, monkeypatch):
    """So many tokens that sums over the vocabulary are open for some of them at a time."""
    monkeypatch.setattr(plans, "TILE_TOKENS", 16)
    monkeypatch.setattr(plans, "GROUP_TOKENS", 40)
    for T, bias in ((200, True), (233, False)):
        check(T, 43, 8, dtype, budget, bias=bias, softcap=3.0, temperature=0.7)
    assert plans.plan(200, 43, 8, dtype, workspace_bytes=0).token_group == 40


@pytest.mark.slow
@pytest.mark.parametrize("schedule", BUDGETS)
@pytest.mark.parametrize(
    "options",
    [
        {"logit_scale": 0.3},
        {"temperature": 0.7},
        {"softcap": 3.0},
        {"softcap": 5.0, "logit_scale": -2.0, "temperature": 1.7},
    ],
    ids=str,
)
def test_head_options(schedule, options, poison):
    # 1,500 tokens leave a block of 2,752 columns: several blocks and a ragged last one
    check(1500, 6001, 16, torch.float32, BUDGETS[schedule], bias=True, spread=3.0, **options)


@settings(max_examples=60, deadline=None)
@given(
    T=st.integers(0, 70),
    V=st.integers(1, 300),
    D=st.integers(1, 40),
    kept=st.floats(0, 1),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    bias=st.booleans(),
    options=st.sampled_from(
        [{}, {"softcap": 2.0}, {"temperature": 0.5, "logit_scale": -3.0}, {"logit_scale": 0.1}]
    ),
    layout=st.sampled_from(["contiguous", "rows apart", "transposed", "every second column"]),
    spread=st.sampled_from([0.1, 1.0, 10.0]),
    seed=st.integers(0, 1000),
)
def test_any_shape(T, V, D, kept, dtype, bias, options, layout, spread, seed):
    budget = int(kept * T) * V * dtype.itemsize
    check(T, V, D, dtype, budget, bias=bias, seed=seed, layout=layout, spread=spread, **options)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", BUDGETS)
def test_rows_outside_the_range_of_the_exponential(schedule):
    """The maximum climbs by 1,000 from block to block, and targets have log-probs down to -1e4."""
    T, V, D = 40, 200_000, 4  # 200,000 columns are two blocks at this T
    hidden, weight, _, targets = make(T, V, D, torch.float32)
    hidden[:, 0] = 1.0
    weight[:, 0] = torch.arange(V) // 50_000 * 1000.0
    weight[V // 2, 0] = 1e4
    budget = BUDGETS[schedule] if BUDGETS[schedule] is not None else T // 3 * V * 4
    slopes = torch.ones(T)
    got, grads = gradients(
        linear_logp, hidden, weight, targets, None, slopes, workspace_bytes=budget, extras=EXTRAS
    )
    truth, true_grads = gradients(
        eager.linear_logp, hidden.double(), weight.double(), targets, None, slopes, extras=EXTRAS
    )
    torch.testing.assert_close(got["logp"].double(), truth["logp"], rtol=1e-6, atol=1e-3)
    torch.testing.assert_close(got["entropy"].double(), truth["entropy"], rtol=1e-3, atol=1e-3)
    for a, b in zip(grads, true_grads):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("softcap", [None, 400.0])
def test_moving_offset_rescales_what_was_kept(frozen, softcap):
    """Logits of block after block lie 39, 41, 80, 82 above those of the first: offsets move by more than
    40 where what came before still counts, and stay where a target has shown what is to come."""
    T, V, D = 2048, 9000, 3
    hidden, weight, _, targets = make(T, V, D, torch.float32, spread=0.5)
    hidden[:, 0] = 1.0
    weight[:, 0] = torch.tensor([0.0, 39.0, 41.0, 80.0, 82.0])[torch.arange(V) // 2048]
    targets[::3] = torch.arange(len(targets[::3])) % 500
    slopes = torch.randn(T)
    assert plan(T, V, D, torch.float32).vocab_block == 2048

    def run(function, hidden, weight):
        hidden, weight = hidden.requires_grad_(), weight.requires_grad_(not frozen)
        result = function(hidden, weight, targets, softcap=softcap, extras=EXTRAS)
        result = result if isinstance(result, dict) else result._asdict()
        result["logp"].backward(slopes.to(hidden.dtype))
        return result, [hidden.grad, weight.grad][: 2 - frozen]

    got, grads = run(linear_logp, hidden.clone(), weight.clone())
    truth, true_grads = run(eager.linear_logp, hidden.double(), weight.double())
    for name in ("logp", "entropy", "log_sum_p2"):
        torch.testing.assert_close(got[name].double(), truth[name], rtol=2e-6, atol=2e-5)
    for a, b in zip(grads, true_grads):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("frozen", [False, True])
def test_small_slopes_in_fp16_do_not_vanish(frozen):
    """A flat softmax over 60,000 columns with slopes of 1e-2: s = c / l is below fp16's range."""
    hidden, weight, _, targets = make(64, 60_000, 16, torch.float16, spread=0.1)
    slopes = torch.full((64,), 1e-2)
    leaf = hidden.requires_grad_()
    logp = linear_logp(leaf, weight.requires_grad_(not frozen), targets).logp
    logp.backward(slopes)
    truth, (true_hidden, true_weight) = gradients(
        eager.linear_logp, hidden.double(), weight.double(), targets, None, slopes
    )
    # With a trainable head each element of the gradient tile, 2e-7, is rounded to fp16's 6e-8.
    allowed = 2e-3 if frozen else 2e-2
    error = (leaf.grad.double() - true_hidden).abs().max()
    assert error <= allowed * true_hidden.abs().max()
    if not frozen:
        error = (weight.grad.double() - true_weight).abs().max()
        assert error <= allowed * true_weight.abs().max()


@pytest.mark.parametrize("schedule", BUDGETS)
def test_logits_of_1e4(schedule):
    """Differences of logits decide, however large they are: here by 1 around 1e4 and around -1e4."""
    T, V = 30, 700
    hidden = torch.ones(T, 1)
    hidden[::2] = -1.0
    weight = (1e4 + torch.randint(0, 5, (V, 1), generator=torch.Generator().manual_seed(0))).float()
    targets = torch.arange(T)
    budget = T // 3 * V * 4 if BUDGETS[schedule] is None else BUDGETS[schedule]
    got, grads = gradients(
        linear_logp, hidden, weight, targets, None, torch.ones(T), workspace_bytes=budget
    )
    truth, true_grads = gradients(
        eager.linear_logp, hidden.double(), weight.double(), targets, None, torch.ones(T)
    )
    torch.testing.assert_close(got["logp"].double(), truth["logp"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grads[1].double(), true_grads[1], rtol=1e-5, atol=1e-6)


def test_masked_vocabulary():
    """A bias of -inf removes columns: here the whole first block and one of the others."""
    T, V, D = 2048, 5000, 4
    hidden, weight, _, targets = make(T, V, D, torch.float32)
    bias = torch.zeros(V)
    bias[:2048], bias[3000] = -torch.inf, -torch.inf
    targets = 3001 + targets % 1000
    got = linear_logp(hidden, weight, targets, bias=bias, extras=("entropy",))
    truth = eager.linear_logp(
        hidden.double(), weight.double(), targets, bias=bias.double(), extras=("entropy",)
    )
    torch.testing.assert_close(got.logp.double(), truth["logp"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got.entropy.double(), truth["entropy"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("wanted", ["hidden", "weight", "bias", "none"])
def test_only_the_wanted_gradient(wanted):
    hidden, weight, bias, targets = make(300, 1000, 8, torch.float32, bias=True)
    leaves = {"hidden": hidden, "weight": weight, "bias": bias}
    truth, true_grads = gradients(
        eager.linear_logp,
        hidden.double(),
        weight.double(),
        targets,
        bias.double(),
        torch.ones(300),
        softcap=4.0,
        logit_scale=2.0,
    )
    for name, leaf in leaves.items():
        leaf.requires_grad_(name == wanted)
    logp = linear_logp(hidden, weight, targets, bias=bias, softcap=4.0, logit_scale=2.0).logp
    assert logp.requires_grad == (wanted != "none")
    if wanted == "none":
        return
    logp.sum().backward()
    for (name, leaf), true_grad in zip(leaves.items(), true_grads):
        assert (leaf.grad is not None) == (name == wanted)
        if leaf.grad is not None:
            torch.testing.assert_close(leaf.grad.double(), true_grad, rtol=1e-4, atol=1e-5)


def test_strides_do_not_matter():
    hidden, weight, _, targets = make(64, 500, 16, torch.float32)
    wide = torch.randn(64, 40)
    wide[:, 3:35:2] = hidden
    column_major = weight.t().contiguous().t()
    expected = gradients(linear_logp, hidden, weight, targets, None, torch.ones(64))
    hidden_view = wide[:, 3:35:2].detach().requires_grad_()
    weight_view = column_major.detach().requires_grad_()
    logp = linear_logp(hidden_view, weight_view, targets).logp
    logp.sum().backward()
    torch.testing.assert_close(logp, expected[0]["logp"])
    torch.testing.assert_close(hidden_view.grad, expected[1][0])
    torch.testing.assert_close(weight_view.grad, expected[1][1])


def test_one_weight_used_twice_and_backward_twice():
    """A tied weight receives the sum of its uses, and a retained graph gives the same again."""
    hidden, weight, _, targets = make(50, 100, 8, torch.float32)
    weight.requires_grad_()
    embedded = weight[targets] + hidden
    loss = linear_logp(embedded, weight, targets).logp.sum()
    (first,) = torch.autograd.grad(loss, weight, retain_graph=True)
    (second,) = torch.autograd.grad(loss, weight)
    truth = weight.detach().double().requires_grad_()
    logits = eager.head_logits(truth[targets] + hidden.double(), truth)
    (expected,) = torch.autograd.grad(eager.logits_logp(logits, targets).sum(), truth)
    torch.testing.assert_close(first.double(), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(first, second)


def test_gradcheck():
    hidden, weight, bias, targets = make(7, 11, 5, torch.float64, bias=True)
    inputs = [x.requires_grad_() for x in (hidden, weight, bias)]
    options = {"softcap": 2.0, "temperature": 0.8}

    def logp(h, w, b, budget):
        return linear_logp(h, w, targets, bias=b, workspace_bytes=budget, **options).logp

    for budget in (0, 3 * 11 * 8, 1 << 20):
        torch.autograd.gradcheck(partial(logp, budget=budget), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_all_schedules_agree(dtype):
    """Kept, half kept, recomputed; and the frozen head's one-pass gradient of the hidden states."""
    hidden, weight, bias, targets = make(900, 5001, 24, dtype, bias=True)
    slopes = torch.randn(900)
    found = {}
    for name, budget in {
        "keep": 1 << 30,
        "mixed": 450 * 5001 * dtype.itemsize,
        "recompute": 0,
    }.items():
        chosen = plan(900, 5001, 24, dtype, workspace_bytes=budget)
        assert chosen.schedule == name
        found[name] = gradients(
            linear_logp, hidden, weight, targets, bias, slopes, workspace_bytes=budget, softcap=6.0
        )
    leaf = hidden.detach().requires_grad_()
    frozen = linear_logp(leaf, weight, targets, bias=bias, softcap=6.0).logp
    frozen.backward(slopes)
    slack = 1e-5 if dtype == torch.float32 else 2**-6
    kept_logp, kept_grads = found["keep"][0]["logp"], found["keep"][1]
    for name in ("mixed", "recompute"):
        torch.testing.assert_close(found[name][0]["logp"], kept_logp, rtol=1e-6, atol=1e-5)
        for a, b in zip(found[name][1], kept_grads):
            assert (a - b).abs().max() <= slack * b.abs().max(), name
    torch.testing.assert_close(frozen, kept_logp, rtol=1e-6, atol=1e-5)
    assert (leaf.grad - kept_grads[0]).abs().max() <= slack * kept_grads[0].abs().max()


def test_bitwise_repeatable():
    hidden, weight, _, targets = make(500, 4000, 32, torch.bfloat16)
    runs = [
        gradients(linear_logp, hidden, weight, targets, None, torch.ones(500)) for _ in range(2)
    ]
    assert torch.equal(runs[0][0]["logp"], runs[1][0]["logp"])
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1]))


def likely_sequence():
    """2,048 bf16 tokens with logits of standard deviation 3 whose targets lie near 14, and the fp64 sum of
    their log-probs."""
    T, V, D = 2048, 16_000, 512
    g = torch.Generator().manual_seed(0)
    weight = (torch.randn(V, D, generator=g) * 3 / D**0.5).bfloat16()
    targets = torch.randint(V, (T,), generator=g)
    hidden = (torch.randn(T, D, generator=g) + weight[targets].float() * 14 / 9).bfloat16()
    truth = eager.linear_logp(hidden.double(), weight.double(), targets)["logp"].sum()
    return hidden, weight, targets, truth


@pytest.mark.slow
def test_sequence_log_prob_error_in_bf16():
    """The sum over 2,048 tokens stays within 5e-3 nats of fp64 where logits are large."""
    hidden, weight, targets, truth = likely_sequence()
    got = linear_logp(hidden, weight, targets).logp.double().sum()
    assert (got - truth).abs() <= 5e-3


@pytest.mark.slow
@pytest.mark.peers
def test_sequence_log_prob_error_is_a_hundredth_of_trls():
    """TRL's chunked log-probs round their tile of logits to bf16: about a nat over the same sequence."""
    kernels = pytest.importorskip("trl.kernels", reason="trl is not installed")
    hidden, weight, targets, truth = likely_sequence()
    chunk, extras = 8192, ()
    theirs = kernels.ChunkedLogProbFunction.apply(
        hidden, weight, None, targets, 1.0, chunk, None, 1.0, extras
    )[0]
    got = linear_logp(hidden, weight, targets).logp
    error, their_error = (got.double().sum() - truth).abs(), (theirs.double().sum() - truth).abs()
    assert their_error > 0.2 and error < their_error / 100


@pytest.mark.parametrize("V", [128_256, 151_936, 262_144])
def test_real_vocabularies(V):
    check(3, V, 8, torch.float32, None)


def test_autocast_uses_its_dtype():
    hidden, weight, _, targets = make(20, 50, 8, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = linear_logp(hidden, weight, targets).logp
    expected = linear_logp(hidden.bfloat16(), weight.bfloat16(), targets).logp
    assert torch.equal(got, expected)


def test_autocast_leaves_the_schedule_alone():
    """fp16 has no range for exponentials that are not normalised, which a later tile with larger logits
    makes; and extras are fp32."""
    T, V = 2048, 5000
    hidden, weight = torch.ones(T, 8), torch.zeros(V, 8)
    weight[4500:] = 2.0  # exp(16) is outside fp16
    hidden.requires_grad_()
    with torch.autocast("cpu", torch.float16):
        got = linear_logp(hidden, weight, torch.arange(T) % 50, extras=("mean_logit",))
        (gradient,) = torch.autograd.grad(got.logp.sum(), hidden)
    torch.testing.assert_close(gradient, torch.full_like(gradient, -2.0), rtol=1e-2, atol=1e-2)
    assert got.mean_logit.dtype == torch.float32
    torch.testing.assert_close(got.mean_logit, torch.full((T,), 1.6))


def test_backward_within_autocast_is_that_without():
    hidden, weight, _, targets = make(300, 50, 8, torch.float32)
    bias, gradients = torch.linspace(-1, 1, 50), []
    for within in (True, False):
        leaf = bias.detach().clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            loss = linear_logp(hidden, weight, targets, bias=leaf).logp.sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=within):
            gradients += torch.autograd.grad(loss, leaf)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("factor", [None, 2])
def test_changed_input_is_noticed(factor):
    """A weight that changes between forward and backward is an error, a Parameter as well."""
    hidden, weight, _, targets = make(20, 50, 8, torch.float32)
    weight.requires_grad_()
    scaled = weight if factor is None else weight * factor
    loss = linear_logp(hidden, scaled, targets).logp.sum()
    with torch.no_grad():
        scaled.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets_T": torch.tensor([0, -100])}, "got -100"),
        ({"targets_T": torch.tensor([0, 9])}, "targets must be in 0..8"),
        ({"targets_T": torch.tensor([0, 1, 2])}, "expected hidden"),
        (
            {"targets_T": torch.tensor([0.0, 1.0])},
            "targets are torch.float32; expected torch.int64",
        ),
        ({"weight_VD": torch.zeros(9, 5)}, "expected hidden"),
        ({"weight_VD": torch.zeros(9, 4, dtype=torch.bfloat16)}, "same floating dtype"),
        ({"bias": torch.zeros(8)}, "bias is"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"softcap": -1.0}, "softcap=-1.0"),
        ({"logit_scale": float("nan")}, "logit_scale=nan"),
        ({"extras": ("entropie",)}, "entropie"),
        ({"implementation": "cuda9"}, "cuda9"),
        ({"workspace_bytes": -1}, "workspace_bytes=-1"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {
        "hidden_TD": torch.zeros(2, 4),
        "weight_VD": torch.zeros(9, 4),
        "targets_T": torch.tensor([0, 8]),
    }
    with pytest.raises(ValueError, match=message):
        linear_logp(**(arguments | change))


@pytest.fixture(params=[(True, False), (False, False), (False, True)], ids=str)
def products(request, monkeypatch):
    """Whether 16-bit products are fast, and whether oneDNN makes the fp32 ones, on any CPU. Small tiles."""
    fast, onednn = request.param
    if onednn and not torch.backends.mkldnn.is_available():
        pytest.skip("PyTorch without oneDNN")
    monkeypatch.setattr(cpu, "half_products", lambda dtype: cpu.Verdict(fast, "the test says so"))
    monkeypatch.setattr(cpu, "by_onednn", lambda: onednn)
    sizes = importlib.import_module("dpo_fast.ops.linear_logp.plan")
    monkeypatch.setattr(sizes, "TILE_TOKENS", 64)
    monkeypatch.setattr(sizes, "TILE_ELEMENTS", 64 * 256)
    return fast


@pytest.mark.parametrize("schedule", BUDGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "temperature": 0.7}], ids=str)
def test_on_every_kind_of_cpu(products, schedule, dtype, options, poison):
    # 150 tokens: three chunks, and with a third of them kept a chunk that ends within a tile
    check(150, 1001, 24, dtype, BUDGETS[schedule], bias=True, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("frozen", [False, True])
def test_no_product_in_16_bits_where_they_are_slow(products, dtype, frozen):
    class Seen(TorchDispatchMode):
        """The dtypes of the operands of all products."""

        dtypes = set()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if any(name in str(function) for name in ("mm", "mv", "linear", "dot")):
                self.dtypes.update(x.dtype for x in args if torch.is_tensor(x))
            return function(*args, **(kwargs or {}))

    hidden, weight, _, targets = make(150, 1001, 24, dtype)
    leaf, weight = hidden.requires_grad_(), weight.requires_grad_(not frozen)
    for budget in (0, 70 * 1001 * 2, 1 << 30):
        with Seen() as seen:
            linear_logp(leaf, weight, targets, workspace_bytes=budget).logp.sum().backward()
        # Sums of exponentials that are not normalised leave fp16's range: a frozen head's are fp32.
        half = products and not (frozen and dtype == torch.float16)
        assert seen.dtypes == ({torch.float32, dtype} if half else {torch.float32})
        seen.dtypes.clear()
