"""Which implementation of an operation runs on a device, and why: `choose_implementation` decides."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from dataclasses import dataclass

import torch

from dpo_fast.errors import UnavailableError
from dpo_fast.ops import cpu

logger = logging.getLogger("dpo_fast")
IMPLEMENTATIONS = ("torch", "triton")  # of every operation
CUDA_OPERATIONS = ("linear_logp",)  # those that csrc has
HAS_TRITON = importlib.util.find_spec("triton") is not None


@dataclass(frozen=True)
class Choice:
    """The name of what was chosen, and one sentence that says why."""

    name: str
    reason: str


def interpreting() -> bool:
    """Whether Triton's interpreter runs kernels on a CPU: TRITON_INTERPRET=1 before import, for tests."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def why_not_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """None if Triton kernels run for this device and dtype, else the reason and the remedy."""
    if not HAS_TRITON:
        return "the package triton is not installed (pip install triton, Linux only)"
    if dtype == torch.float64:
        return "the Triton kernels accumulate in fp32 and take fp32, bf16 and fp16, not fp64"
    if device.type == "cpu":
        if interpreting():
            return None
        return (
            "Triton has no CPU target; set TRITON_INTERPRET=1 before starting Python to run its "
            "interpreter (slow, for tests)"
        )
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if torch.version.hip is None and capability < (8, 0):
            return f"compute capability {capability[0]}.{capability[1]} is below 8.0"
        return None
    return f"no Triton target is known for device type {device.type!r}"


def why_not_cuda(operation: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """None if the kernels of csrc run here (or can be built), else the reason and the remedy."""
    from dpo_fast.ops.linear_logp import cuda_extension

    if operation not in CUDA_OPERATIONS:
        return f"csrc has {', '.join(CUDA_OPERATIONS)} alone; ask for 'triton' or 'auto'"
    if device.type != "cuda" or torch.version.hip is not None:
        return f"csrc is for sm_90 GPUs (H100, H200), not for {device.type}; ask for 'auto'"
    capability = torch.cuda.get_device_capability(device)
    if capability != (9, 0):
        return (
            f"csrc is for compute capability 9.0 (H100, H200), this is {capability[0]}.{capability[1]}; "
            "ask for 'triton' or 'auto'"
        )
    if dtype != torch.bfloat16:
        return f"csrc takes torch.bfloat16, not {dtype}; ask for 'triton' or 'auto'"
    if not HAS_TRITON:
        return why_not_triton(device, dtype)  # its schedules begin with a small kernel of Triton's
    return cuda_extension.why_not()


def choose_implementation(
    operation: str,
    device: torch.device,
    dtype: torch.dtype,
    requested: str = "auto",
    small: bool = False,
) -> Choice:
    """Choose an implementation. Each choice is logged once, and never while compiling.

    Args:
        requested: `auto`, `torch`, `triton` or `cuda`.
        small: a head with few columns that csrc serves: `auto` takes csrc, if it is built.

    Raises:
        UnavailableError: `requested` cannot run here.
        ValueError: `requested` is not one of the names.
    """
    choose = _choice if torch.compiler.is_compiling() else _logged_choice
    return choose(operation, device, dtype, requested, small)


@functools.cache
def _logged_choice(
    operation: str, device: torch.device, dtype: torch.dtype, requested: str, small: bool
) -> Choice:
    choice = _choice(operation, device, dtype, requested, small)
    logger.info("%s on %s in %s: %s (%s)", operation, device, dtype, choice.name, choice.reason)
    return choice


def _choice(
    operation: str, device: torch.device, dtype: torch.dtype, requested: str, small: bool
) -> Choice:
    names = ("auto", *IMPLEMENTATIONS, "cuda")
    if requested not in names:
        raise ValueError(f"implementation={requested!r}: choose {', '.join(names)}")
    if requested == "cuda":
        obstacle = why_not_cuda(operation, device, dtype)
    else:
        obstacle = None if requested == "torch" else why_not_triton(device, dtype)
    if requested != "auto" and obstacle:
        raise UnavailableError(
            f"implementation={requested!r} cannot run {operation} here: {obstacle}"
        )
    if requested != "auto":
        return Choice(requested, "asked for by name")
    if device.type == "cpu":
        products = f"; {cpu.describe(dtype)}" if operation == "linear_logp" else ""
        return Choice("torch", f"the torch implementation is the fast one on a CPU{products}")
    if obstacle:
        return Choice("torch", obstacle)
    if small and why_not_cuda(operation, device, dtype) is None and _csrc_is_built():
        return Choice("cuda", "csrc is built, and on an H100 the faster one for a small head")
    return Choice("triton", f"Triton compiles for {device.type} here")


def _csrc_is_built() -> bool:
    """`auto` builds nothing: a compiler would run unasked, and on every rank."""
    from dpo_fast.ops.linear_logp import cuda_extension

    return cuda_extension.built() is not None
