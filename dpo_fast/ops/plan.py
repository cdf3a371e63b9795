"""Which products the head computes and what it keeps: a pure function of sizes, printable and testable."""

from __future__ import annotations

from dataclasses import dataclass

import torch

MIB = 1 << 20
TILE_TOKENS = 2048  # rows of a tile: enough for a GEMM near its peak
MIN_TILE_ELEMENTS = 1 << 18  # 1 MiB of fp32: the tile that remains when the workspace is 0
MAX_TILE_ELEMENTS = 1 << 22  # 16 MiB of fp32: larger tiles leave the last-level cache of a CPU


@dataclass(frozen=True)
class HeadPlan:
    """The schedule of one call. A "gemm" is one product of 2*T*V*D flops, forward and backward together.

    schedule: `logps` (nothing differentiable), `frozen` (no gradient for the head), `keep` (all
    exponentials kept), `recompute` (none kept) or `mixed` (the first `kept_tokens` kept).
    """

    schedule: str
    kept_tokens: int
    token_chunk: int
    vocab_block: int
    kept_bytes: int
    workspace_bytes: int
    gemms: float

    def __str__(self) -> str:
        return (
            f"{self.schedule}: {self.gemms:.2f} products, {self.kept_tokens} tokens kept "
            f"({self.kept_bytes / MIB:.0f} MiB), tiles of {self.token_chunk} x {self.vocab_block}"
        )


def default_workspace_bytes(device: torch.device) -> int:
    """1 GiB on a CPU, a sixteenth of the device's memory on a GPU.

    A share of the *free* memory would make the schedule, and with it the last bits of the result,
    depend on what else runs. The device's size does not change between runs.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // 16
    return 1024 * MIB


def plan(
    T: int,
    V: int,
    D: int,
    dtype: torch.dtype,
    *,
    needs_hidden: bool = True,
    needs_head: bool = True,
    workspace_bytes: int = 1024 * MIB,
    keeps: bool = True,
) -> HeadPlan:
    """Choose the schedule for T tokens, a [V, D] head and a byte budget.

    Args:
        needs_hidden: a gradient of the hidden states is wanted.
        needs_head: a gradient of the weight or the bias is wanted.
        workspace_bytes: bounds the kept exponentials [kept_tokens, V] in `dtype`, and shrinks the
            fp32 tile (never below 1 MiB, so 0 is allowed). D does not matter to the choice today.
        keeps: the implementation can keep exponentials, and can compute a frozen head's gradient in
            its forward pass (`torch` can; `triton` recomputes).
    """
    if workspace_bytes < 0:
        raise ValueError(f"workspace_bytes={workspace_bytes} must be 0 or more")
    tile = min(max(workspace_bytes // 16, MIN_TILE_ELEMENTS), MAX_TILE_ELEMENTS)
    token_chunk = max(1, min(T, TILE_TOKENS, tile // 128))
    vocab_block = min(V, max(128, tile // token_chunk // 64 * 64))
    kept = 0
    row_bytes = V * dtype.itemsize
    if not needs_hidden and not needs_head:
        schedule, gemms = "logps", 1.0
    elif not needs_head:
        schedule, gemms = "frozen", 2.0 if keeps else 3.0
    else:
        if keeps and dtype != torch.float16:  # fp16 has no range for sums that are not normalised
            kept = min(T, workspace_bytes // row_bytes)
        schedule = "keep" if kept == T else "mixed" if kept else "recompute"
        backward = 1 + needs_hidden
        gemms = 1 + backward + (0 if T == 0 else 1 - kept / T)
    kept_bytes = kept * row_bytes
    return HeadPlan(schedule, kept, token_chunk, vocab_block, kept_bytes, workspace_bytes, gemms)
