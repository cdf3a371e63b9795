"""`logits_logp`, both implementations, against its definition in fp64."""

import sys

import pytest
import torch

from dpo_fast.errors import UnavailableError
from dpo_fast.ops import eager, logits_logp
from tests.support.device import DEVICE, ON_A_GPU, each_implementation

module = sys.modules["dpo_fast.ops.logits_logp"]  # the function shadows its module's name
pytestmark = [
    each_implementation,
    pytest.mark.usefixtures("on_the_device"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy, where infinities meet
]
HALF_UNIT = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def evaluate(fn, logits, targets, slopes, **options):
    logits = logits.detach().requires_grad_()
    logp = fn(logits, targets, **options)
    return logp, torch.autograd.grad(logp, logits, slopes.to(logp.dtype))[0]


def check(logits, targets, implementation, **options):
    slopes = torch.linspace(-1, 2, targets.numel()).view(targets.shape)
    got, grad = evaluate(
        logits_logp, logits, targets, slopes, implementation=implementation, **options
    )
    same, _ = evaluate(eager.logits_logp, logits, targets, slopes, **options)
    truth, true_grad = evaluate(eager.logits_logp, logits.double(), targets, slopes, **options)
    assert got.dtype == torch.float32 and got.shape == targets.shape
    assert grad.dtype == logits.dtype and grad.shape == logits.shape
    if not truth.numel():
        return
    allowed = 2 * (same - truth).abs().max() + 1e-6 * truth.abs().max()
    assert (got - truth).abs().max() <= allowed
    # Each element: one rounding to the logits' dtype, and fp32 rounding relative to the largest.
    error = (grad.double() - true_grad).abs()
    allowed = HALF_UNIT[logits.dtype] * true_grad.abs() + 1e-6 * true_grad.abs().max().clamp_min(1)
    assert (error <= allowed).all(), (error - allowed).max()


SHAPES = [
    (0, 5),  # nothing to score
    (1, 1),  # p = 1
    (7, 64),  # one whole block of the interpreter
    (13, 131),  # several blocks, the last one ragged
]
if ON_A_GPU:  # a GPU's blocks have 4096 columns
    SHAPES += [(5, 8192), (300, 50_257)]


@pytest.mark.parametrize("dtype", HALF_UNIT, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_definition(shape, dtype, implementation, poison):
    g = torch.Generator("cpu").manual_seed(0)
    logits = (torch.randn(shape, generator=g, device="cpu") * 4).to(DEVICE, dtype)
    targets = torch.randint(shape[1], shape[:1], generator=g, device="cpu").to(DEVICE)
    if shape[0]:
        targets[0], targets[-1] = 0, shape[1] - 1
    check(logits, targets, implementation)
    check(logits, targets, implementation, temperature=0.6)


def test_shifted_batch_is_read_in_place(implementation, poison):
    """logits[:, :-1] of a batch cannot be flattened without a copy, and is not."""
    logits = torch.randn(3, 6, 70)[:, :-1]
    matrices = module._matrices(logits)
    assert [x.shape for x in matrices] == [(5, 70)] * 3
    assert all(x.data_ptr() == logits[i].data_ptr() for i, x in enumerate(matrices))
    check(logits, torch.randint(70, (3, 5)), implementation, temperature=1.7)


def test_other_strides(implementation, poison):
    targets = torch.tensor([0, 69, 3, 4])
    check(torch.randn(4, 90)[:, 5:75], targets, implementation)  # rows further apart than V
    check(torch.randn(70, 4).t(), targets, implementation)  # columns apart
    check(torch.randn(1, 70).expand(4, 70), targets, implementation)  # one row four times
    check(torch.randn(70), torch.tensor(69), implementation)  # a single row without a batch


def test_masked_vocabulary_and_large_logits(implementation, poison):
    logits = torch.randn(5, 200) * 3000
    logits[:, :70] = -torch.inf  # a whole block of the interpreter, and more
    logits[:, 150:] = -torch.inf
    targets = torch.tensor([70, 80, 90, 100, 149])
    slopes = torch.ones(5)
    got, grad = evaluate(logits_logp, logits, targets, slopes, implementation=implementation)
    truth, true_grad = evaluate(eager.logits_logp, logits.double(), targets, slopes)
    torch.testing.assert_close(got.double(), truth, rtol=1e-6, atol=2e-3)
    torch.testing.assert_close(grad.double(), true_grad, rtol=2e-6, atol=2e-6)
    assert (grad[:, :70] == 0).all()


def test_temperature_scales_distances(implementation, poison):
    """Near 1e4 a scaled logit is rounded by 5e-4, and so is a log-sum-exp, of which a gradient must not be
    made. A log-prob must never come out above 0."""
    g = torch.Generator("cpu").manual_seed(0)
    logits = torch.randint(9990, 10_000, (40, 200), generator=g, device="cpu").float().to(DEVICE)
    targets = torch.arange(40)
    logits[targets[::2], targets[::2]] = 10_100.0  # sure of these: 0 is what is left
    slopes, options = torch.ones(40), {"temperature": 0.7}
    got, grad = evaluate(
        logits_logp, logits, targets, slopes, implementation=implementation, **options
    )
    truth, true_grad = evaluate(eager.logits_logp, logits.double(), targets, slopes, **options)
    assert (got - truth).abs().max() <= 2e-6
    assert (got <= 0).all()
    assert (grad - true_grad).abs().max() <= 2e-6


def test_chunks_do_not_matter(implementation, monkeypatch):
    if implementation != "torch":
        pytest.skip("only the torch implementation cuts rows into chunks")
    logits, targets = torch.randn(9, 50), torch.randint(50, (9,))
    whole = evaluate(logits_logp, logits, targets, torch.ones(9), implementation="torch")
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 100)  # two rows at a time
    parts = evaluate(logits_logp, logits, targets, torch.ones(9), implementation="torch")
    assert all(torch.equal(a, b) for a, b in zip(whole, parts))


def test_fp64_has_fp64_gradients(implementation):
    logits = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 6, 2])
    if implementation == "triton":
        with pytest.raises(UnavailableError, match="fp64"):
            logits_logp(logits, targets, implementation="triton")
        return
    assert torch.autograd.gradcheck(lambda x: logits_logp(x, targets, temperature=0.8), (logits,))


def test_mistakes_are_named(implementation):
    logits, targets = torch.randn(3, 7), torch.tensor([0, 6, 2])
    wrong = [
        ({"targets_T": targets[:2]}, "expected logits"),
        ({"targets_T": targets.float()}, "int64"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"logits_TV": logits.long()}, "floating"),
        ({"implementation": "fast"}, "implementation='fast'"),
    ]
    if not ON_A_GPU:  # there it is an assertion of the device, after which a process can do no more
        wrong += [({"targets_T": targets + step}, "targets must be in 0..6") for step in (1, -1)]
    good = {"logits_TV": logits, "targets_T": targets, "implementation": implementation}
    for change, message in wrong:
        with pytest.raises(ValueError, match=message):
            logits_logp(**(good | change))
