"""What launchers ask of a device."""

from __future__ import annotations

import contextlib
from contextvars import ContextVar

import torch
from torch import Tensor

COMPILE_ONLY = ContextVar("compile_only", default=False)  # of `launch`, set by the search for tiles


def launch(kernel, grid: tuple[int, ...], **arguments) -> None:
    """Launch a Triton kernel, or with COMPILE_ONLY compile it for these arguments."""
    if COMPILE_ONLY.get():
        kernel.warmup(grid=grid, **arguments)
    else:
        kernel[grid](**arguments)


def arch_of(device: torch.device) -> str:
    if device.type != "cuda":
        return "interpreter" if device.type == "cpu" else device.type
    if torch.version.hip is not None:
        return "hip"
    major, minor = torch.cuda.get_device_capability(device)
    return "sm_100" if major == 10 else f"sm_{major}{minor}"


def on_device(tensor: Tensor):
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def interpretable(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """bf16 on a CPU becomes fp32, with the same values; anything else is unchanged.

    The interpreter multiplies the bit patterns of bf16, and truncates where a device rounds.
    """
    narrow = lambda x: x is not None and x.dtype == torch.bfloat16 and not x.is_cuda  # noqa: E731
    return tuple(x.float() if narrow(x) else x for x in tensors)
