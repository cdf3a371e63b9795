"""`warm_up` launches every kernel that later calls launch, as they will be compiled."""

import pytest
import torch

from dpo_fast.ops import linear_logp, warm_up
from dpo_fast.ops.dispatch import interpreting

interpreter = pytest.importorskip("triton.runtime.interpreter")
pytestmark = [
    pytest.mark.skipif(not interpreting(), reason="reads the launches of Triton's interpreter"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
D, V = 64, 300


def compiled_as(name: str, value, kernel):
    """What of an argument decides which machine code a launch needs, by the rules of triton.jit."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if hasattr(value, "block_shape"):
        return value.base.dtype, tuple(value.block_shape)
    constant = "constexpr" in str(kernel.fn.__annotations__.get(name))
    if constant or value is None or name in ("num_warps", "num_stages"):
        return value
    if isinstance(value, float):
        return float
    if name in (kernel.kwargs.get("do_not_specialize") or ()):
        return int
    return value == 1, value % 16 == 0


def launches(patch, function) -> set:
    found, run = set(), interpreter.InterpretedFunction.run

    def noted(kernel, *arguments, grid, warmup, **options):
        named = dict(zip(kernel.arg_names, arguments)) | options
        key = tuple((n, compiled_as(n, x, kernel)) for n, x in sorted(named.items()))
        found.add((kernel.__name__, key))
        return run(kernel, *arguments, grid=grid, warmup=warmup, **options)

    with patch.context() as inner:
        inner.setattr(interpreter.InterpretedFunction, "run", noted)
        function()
    return found


def differences(new: set, ready: set) -> list:
    """What is new of each launch, beside the one of that kernel that is most like it."""
    found = []
    for kernel, key in new:
        gaps = [set(key) - set(other) for name, other in ready if name == kernel]
        found.append((kernel, min(gaps, key=len)))
    return found


def call(T: int, needs_hidden: bool, needs_weight: bool, workspace_bytes, dtype, **options):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(T, D, generator=g).to(dtype).requires_grad_(needs_hidden)
    weight = torch.randn(V, D, generator=g).to(dtype).requires_grad_(needs_weight)
    logp = linear_logp(
        hidden,
        weight,
        torch.arange(T),
        implementation="triton",
        workspace_bytes=workspace_bytes,
        **options,
    ).logp
    if logp.requires_grad:
        logp.sum().backward()


@pytest.mark.parametrize("extras", [(), ("entropy", "is_top1")], ids=["plain", "extras"])
def test_later_calls_launch_nothing_new(monkeypatch, extras):
    # The interpreter gets copies of bf16, whose strides are their own.
    dtype = torch.float32
    given = {"dtype": dtype, "extras": extras}

    def warm():
        warm_up("cpu", D, V, implementation="triton", **given)

    def calls():
        for T in (1, 40):
            half = T // 2 * V * dtype.itemsize
            for workspace_bytes in (None, half, 0):
                call(T, False, False, workspace_bytes, **given)
                call(T, True, False, workspace_bytes, **given)
                call(T, True, True, workspace_bytes, **given)
                call(T, False, True, workspace_bytes, **given)

    ready, wanted = launches(monkeypatch, warm), launches(monkeypatch, calls)
    assert {name for name, _ in wanted} == {
        *("target_product_kernel", "rows_kernel", "merge_kernel"),
        *("gradient_kernel", "scale_rows_kernel"),
    }
    assert wanted <= ready, differences(wanted - ready, ready)


def test_a_frozen_head_takes_no_memory_for_its_gradient(monkeypatch):
    asked = []
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda x, y: asked.append(len(y)) or grad(x, y))
    warm_up("cpu", D, V, torch.float32, frozen=True, implementation="triton")
    assert asked == [1, 1]
