"""Micro-benchmarks of every contender at small sizes, so that each stays right. No time is asserted."""

import dataclasses
import importlib.util
import re
from types import SimpleNamespace

import pytest

pytest.importorskip("pytest_benchmark")

import torch

from benchmarks.cli import LIGER, Package
from benchmarks.kernels.case import Case, head_inputs
from benchmarks.kernels.checks import compare
from benchmarks.kernels.contenders import pair_slopes
from benchmarks.kernels.meters import cpu_peak_mib
from benchmarks.kernels.operations import OPERATIONS
from benchmarks.kernels.peers import PEERS

# One compiled contender in one mode is enough.
COMPILED = [("linear_logp", "materialised, compiled", "trainable")]
DTYPES = {"logps": "bf16", "frozen": "fp32", "trainable": "bf16"}


def marks(contender) -> list:
    """A peer's contender imports its package. A compilation starts a compiler, and takes ten seconds."""
    peers = [pytest.mark.peers] if contender.package else []
    return peers + [pytest.mark.processes, pytest.mark.slow] * contender.compiled


CELLS = [
    pytest.param(op, contender.name, mode, marks=marks(contender))
    for op, operation in OPERATIONS.items()
    for contender in operation.contenders
    for mode in operation.modes
    if mode in contender.modes and "cpu" in contender.devices
    if not contender.compiled or (op, contender.name, mode) in COMPILED
]


def cell(op: str, mode: str, T: int = 16) -> Case:
    """32 and 500: columns that are no multiple of any tile."""
    operation = OPERATIONS[op]
    D, V = (32 if "D" in operation.sizes else 0, 500 if "V" in operation.sizes else 0)
    dtype = (operation.dtypes or (DTYPES[mode],))[0]
    return Case(op, mode, T, D, V, dtype, "cpu")


@pytest.mark.parametrize(("op", "name", "mode"), CELLS)
def test_contender(benchmark, op, name, mode):
    operation, case = OPERATIONS[op], cell(op, mode)
    contender = next(c for c in operation.contenders if c.name == name)
    if reason := contender.why_not(case):
        pytest.skip(reason)
    inputs = operation.inputs(case, 0)
    rounds = 1 if "triton" in name else 2  # the interpreter takes a second where a GPU takes none
    outputs = benchmark.pedantic(contender.build(case, inputs), rounds=rounds)
    truth = operation.truth(inputs)
    slopes = {"token": inputs.slopes, "equal": -torch.ones_like(inputs.slopes)}
    if contender.slopes == "pairs":
        slopes["pairs"] = pair_slopes(truth.logp)
    names = operation.gradients[mode]
    found = truth.gradients(contender.slopes, slopes[contender.slopes], names) if names else {}
    errors = compare(outputs, truth.logp, [found[name] for name in names])
    assert errors.above_gate(contender, case.dtype) is None


@pytest.mark.parametrize("mode", ["logps", "frozen", "trainable"])
def test_bare_products(benchmark, mode):
    operation, case = OPERATIONS["linear_logp"], cell("linear_logp", mode)
    products = operation.products(case, operation.inputs(case, 0))
    assert list(products) == ["logits", "dH", "dW"][: int(operation.least[mode])]
    benchmark.pedantic(lambda: [product() for product in products.values()], rounds=2)


@pytest.mark.processes
def test_memory_does_not_grow_with_whole_logits():
    """With a workspace that holds everything, the extra memory is one [T, V] and not several."""
    contenders = {c.name: c for c in OPERATIONS["linear_logp"].contenders}
    case = Case("linear_logp", "trainable", 1024, 64, 32000, "fp32", "cpu")
    whole = case.T * case.V * 4 / (1 << 20)
    assert cpu_peak_mib(contenders["dpo_fast torch"], case) < 1.3 * whole
    assert cpu_peak_mib(contenders["materialised"], case) > 1.8 * whole
    unknown = dataclasses.replace(contenders["materialised"], name="nobody")
    with pytest.raises(RuntimeError, match="StopIteration"):  # and not a lack of memory
        cpu_peak_mib(unknown, case)


def why_not(name: str, T: int = 4096, V: int = 128256, dtype: str = "bf16") -> str | None:
    case = Case("linear_logp", "trainable", T, 4096, V, dtype, "cuda")
    return next(c for c in PEERS if c.name == name).why_not(case)


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of some capability where a package's files and some modules are there, and no other."""

    def make(capability, *there: str):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: capability)
        monkeypatch.setattr(
            importlib.util,
            "find_spec",
            lambda name: (
                SimpleNamespace(submodule_search_locations=there) if name in there else None
            ),
        )

    return make


def test_a_peer_without_a_part_of_it_is_named(gpu):
    """With what it lacks and how to get it; on Hopper alone Liger's CuTe kernels are asked for."""
    gpu((9, 0))
    assert why_not("quack ce").startswith("quack-kernels is not installed: pip install")
    gpu((9, 0), "quack")
    assert "not cutlass, which it needs: pip install" in why_not("quack ce")
    gpu((9, 0), "quack", "cutlass")
    assert why_not("quack ce") is None and "see quack ce" in why_not("quack ce, logits")
    assert "in multiples of 8, not 4096, 4096, 50257" in why_not("quack ce", V=50257)
    gpu((9, 0), "liger_kernel", "cutlass")
    old = r"liger-kernel.* has no .*\.py: upgrade it: pip install"
    for name in ("liger scaled ce", "liger ce, sm_90"):
        assert re.match(old, why_not(name))


def test_which_kernels_of_liger_run_where(gpu, monkeypatch):
    monkeypatch.setattr(Package, "lacks", lambda package, file: None)
    gpu((9, 0), "liger_kernel")
    for name in ("liger scaled ce", "liger ce, sm_90"):
        assert "need nvidia-cutlass-dsl: pip install 'liger-kernel[cutedsl]'" in why_not(name)
    gpu((9, 0), "liger_kernel", "cutlass")
    assert why_not("liger scaled ce") is why_not("liger ce, sm_90") is None
    assert "take bf16, not fp16" in why_not("liger scaled ce", dtype="fp16")
    assert "V of 256, not 4096 and 151936" in why_not("liger ce, sm_90", V=151936)
    gpu((10, 0), "liger_kernel")  # PyTorch in chunks, in any dtype
    assert why_not("liger scaled ce", dtype="fp32") is None
    assert why_not("liger ce, sm_90") == "needs compute capability 9.0"


@pytest.mark.peers
def test_the_files_that_say_whether_liger_is_new_enough_are_there():
    pytest.importorskip("liger_kernel")
    for file in (
        "fused_linear_scaled_cross_entropy",
        "cutedsl/ops/fused_linear_cross_entropy_sm90",
    ):
        assert LIGER.lacks(f"ops/{file}.py") is None
    assert "has no ops/no_such.py: upgrade it: pip install" in LIGER.lacks("ops/no_such.py")


def test_inputs_are_peaked_like_a_language_model():
    inputs = head_inputs(512, 256, 8000, torch.float32)
    hidden, weight, targets, slopes = (x.detach() for x in inputs)
    logp = torch.log_softmax(hidden @ weight.t(), -1)
    chosen = logp.gather(1, targets[:, None]).squeeze(1)
    assert -1.7 < chosen.mean() < -0.7
    assert 0.6 < (logp.argmax(-1) == targets).float().mean() < 0.95
    assert (logp.exp() > 2**-12).float().mean() < 0.05  # few words carry the mass
    assert (targets < 80).float().mean() > 0.4  # the first hundredth of the vocabulary
    assert slopes.std() > 0.5
