"""Which products the head computes and what it keeps: a pure function of sizes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

MIB = 1 << 20
# On a CPU a tile is [TILE_TOKENS, ...] of fp32 logits: 16 MiB, small enough for a last-level cache.
TILE_TOKENS = 2048
TILE_ELEMENTS = 1 << 22
# A block of a 16-bit weight is copied to fp32: 32 MiB at most, however few tokens there are.
COPY_ELEMENTS = 1 << 23
# Tokens whose sums over the vocabulary are open at a time, in a backward pass over many more of them.
GROUP_TOKENS = 1 << 14
# On a GPU products of this many rows run at their peak, and tiles end where a kernel's tiles end.
CHUNK_TOKENS = 4096
BLOCK_COLUMNS = 8192
ROW_MULTIPLE = 256
MIN_GPU_ELEMENTS = 1 << 22  # 4096 x 1024: below this a product is mostly its launch
WORTH_KEEPING = 8  # keep a part of the tokens if that is at least 1 / 8 of them


@dataclass(frozen=True)
class HeadPlan:
    """The schedule of one call, its memory and its cost.

    schedule: `logps` (nothing differentiable), `frozen` (no gradient for the head), `keep` (all
        exponentials kept), `recompute` (none kept) or `mixed` (the first `kept_tokens` kept).
    kept_tokens: tokens whose exponentials are kept between forward and backward.
    token_chunk, vocab_block: the tile of [T, V] that exists at a time, beside what is kept.
    token_group: for `torch`, tokens whose tiles are made again together; sums and copies are of so many.
    tokens_first: for each chunk of tokens recomputed tiles go through the vocabulary; else the reverse.
    products: dtype of the operands of products by exponentials and gradient tiles.
    residual_sums: sums over tiles are held in 2 x 16 bits instead of 32 (see `ProductSum`).
    kept_bytes: memory between forward and backward.
    tile_bytes, sum_bytes: memory during a pass.
    workspace_bytes: the budget.
    gemms: products of 2 T V D flops, forward and backward together.
    """

    schedule: str
    kept_tokens: int
    token_chunk: int
    vocab_block: int
    token_group: int
    tokens_first: bool
    products: torch.dtype
    residual_sums: bool
    kept_bytes: int
    tile_bytes: int
    sum_bytes: int
    workspace_bytes: int
    gemms: float

    @property
    def bytes(self) -> int:
        return self.kept_bytes + self.tile_bytes + self.sum_bytes

    def __str__(self) -> str:
        dtype = str(self.products).removeprefix("torch.")
        return (
            f"{self.schedule}: {self.gemms:.2f} GEMMs, {self.kept_tokens} tokens kept "
            f"({self.kept_bytes / MIB:.0f} MiB), tiles of {self.token_chunk} x {self.vocab_block} "
            f"({self.tile_bytes / MIB:.0f} MiB), sums {self.sum_bytes / MIB:.0f} MiB, "
            f"multiplied in {dtype}"
        )


def default_workspace_bytes(device: torch.device) -> int:
    """1 GiB on a CPU, a sixteenth of the device's memory on a GPU.

    A share of the free memory would make the schedule, and so the last bits of the result, depend on what
    else runs.
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
    implementation: str = "torch",
    products: torch.dtype | None = None,
) -> HeadPlan:
    """Choose the schedule for T tokens, a [V, D] head and a byte budget.

    Args:
        needs_hidden: a gradient of the hidden states is wanted.
        needs_head: a gradient of the weight or the bias is wanted.
        workspace_bytes: bounds kept exponentials [kept_tokens, V] in `dtype`, tiles and sums. With 0 the
            smallest tile and the sums that cannot be avoided remain.
        implementation: `torch` (fp32 tiles for a cache), `triton` or `cuda` (tiles in `dtype` for cuBLAS).
        products: for `torch`, from `ops.cpu.product_dtype`; default: `dtype`. If it is fp32 and `dtype`
            is not, what is kept stays in `dtype`, and a block at a time is copied to fp32.
    """
    if workspace_bytes < 0:
        raise ValueError(f"workspace_bytes={workspace_bytes} must be 0 or more")
    stride = V if implementation == "torch" else kept_stride(V)
    sizes = _Sizes(T, V, D, dtype, products or dtype, workspace_bytes, stride)
    choose = _plan_torch if implementation == "torch" else _plan_triton
    return choose(sizes, needs_hidden, needs_head)


@dataclass(frozen=True)
class _Sizes:
    T: int
    V: int
    D: int
    dtype: torch.dtype
    products: torch.dtype
    workspace_bytes: int
    stride: int  # elements from one row of kept exponentials to the next

    @property
    def row_bytes(self) -> int:
        return self.stride * self.dtype.itemsize

    @property
    def keeps(self) -> bool:
        """Whether exponentials that are not normalised fit: fp16 has no range for them."""
        return self.dtype != torch.float16

    def plan(self, schedule: str, gemms: float, **columns) -> HeadPlan:
        defaults = {
            "kept_tokens": 0,
            "token_chunk": 0,
            "vocab_block": 0,
            "token_group": 0,
            "tokens_first": True,
            "residual_sums": False,
            "tile_bytes": 0,
            "sum_bytes": 0,
        }
        columns = defaults | columns
        columns["kept_bytes"] = columns["kept_tokens"] * self.row_bytes
        columns |= {"products": self.products, "workspace_bytes": self.workspace_bytes}
        return HeadPlan(schedule=schedule, gemms=gemms, **columns)

    def trainable(self, needs_hidden: bool, **columns) -> HeadPlan:
        """keep, mixed or recompute, by the number of kept tokens."""
        kept = columns["kept_tokens"]
        schedule = "keep" if kept == self.T else "mixed" if kept else "recompute"
        again = 0 if self.T == 0 else 1 - kept / self.T
        return self.plan(schedule, 2 + needs_hidden + again, **columns)


def kept_stride(V: int) -> int:
    """Elements from one kept row to the next: a multiple of 16, as tensor descriptors need."""
    return -(-V // 16) * 16


def _plan_torch(sizes: _Sizes, needs_hidden: bool, needs_head: bool) -> HeadPlan:
    T, V, D, budget = sizes.T, sizes.V, sizes.D, sizes.workspace_bytes
    precise = max(4, sizes.dtype.itemsize)
    copies = sizes.dtype.itemsize < precise  # of the weight's blocks; logits are made in fp32
    token_chunk = max(1, min(T, TILE_TOKENS))
    widest = TILE_ELEMENTS // token_chunk
    if copies:
        widest = min(widest, max(COPY_ELEMENTS // D, 64))
    vocab_block = min(V, widest // 64 * 64)
    columns = {"token_chunk": token_chunk, "vocab_block": vocab_block, "tokens_first": False}
    columns["tile_bytes"] = vocab_block * (token_chunk + copies * D) * precise
    if not needs_head:
        if not needs_hidden:
            return sizes.plan("logps", 1.0, **columns)
        return sizes.plan("frozen", 2.0, **columns, sum_bytes=token_chunk * D * precise)
    kept = min(T, budget // sizes.row_bytes) if sizes.keeps else 0
    # Kept exponentials that are multiplied as they lie need no sum over tiles.
    tiled = T if sizes.products != sizes.dtype else T - kept
    if tiled:
        group, rows = _group(tiled, T - kept, V, copies, needs_hidden)
        columns |= {"token_group": group, "sum_bytes": (rows + vocab_block) * D * precise}
    return sizes.trainable(needs_hidden, **columns, kept_tokens=kept)


def _group(tiled: int, again: int, V: int, copies: bool, needs_hidden: bool) -> tuple[int, int]:
    """Tokens of a group, and rows of D that are held in fp32 for it.

    16-bit hidden states whose logits are made again, and gradients, have fp32 copies, of a group at a time.
    Several groups keep the sums of the weight's gradient open in fp32, all V rows of them. In fp32 nothing
    is copied.

    tiled, again: tokens that have tiles, and those of them whose logits are made again.
    """
    most = min(tiled, GROUP_TOKENS)
    if not copies:
        return most, 0
    whole, part = (min(again, size) + needs_hidden * size for size in (tiled, most))
    return (tiled, whole) if whole <= V + part else (most, V + part)


def _plan_triton(sizes: _Sizes, needs_hidden: bool, needs_head: bool) -> HeadPlan:
    T, budget = sizes.T, sizes.workspace_bytes
    if not needs_head and not needs_hidden:
        return sizes.plan("logps", 1.0)
    # The product E W of a chunk of tokens in fp32, before its rows are scaled.
    sum_bytes = min(T, CHUNK_TOKENS) * sizes.D * 4
    if not needs_head:
        rows = min(T, 2 * CHUNK_TOKENS, max(budget - sum_bytes, 0) // sizes.row_bytes)
        if sizes.keeps and rows >= min(T, ROW_MULTIPLE):
            chunk = _fit(T, rows)
            columns = {"tile_bytes": chunk * sizes.row_bytes, "sum_bytes": sum_bytes}
            return sizes.plan("frozen", 2.0, token_chunk=chunk, vocab_block=sizes.V, **columns)
        # Not even a few rows fit: row sums first, then gradient tiles of any width.
        rest = _recomputed(sizes, budget, True, False, widest=sizes.V)
        return sizes.plan("frozen", 3.0, **rest)
    if sizes.keeps and T * sizes.row_bytes + sum_bytes <= budget:
        return sizes.trainable(needs_hidden, kept_tokens=T, sum_bytes=sum_bytes)
    rest = _recomputed(sizes, budget, needs_hidden, True, widest=BLOCK_COLUMNS)
    room = max(budget - rest["tile_bytes"] - rest["sum_bytes"] - sum_bytes, 0)
    kept = min(T, room // sizes.row_bytes // ROW_MULTIPLE * ROW_MULTIPLE) if sizes.keeps else 0
    if kept * WORTH_KEEPING >= T > 0:
        rest["sum_bytes"] += sum_bytes
        return sizes.trainable(needs_hidden, kept_tokens=kept, **rest)
    rest = _recomputed(sizes, budget, needs_hidden, True, widest=sizes.V)
    return sizes.trainable(needs_hidden, kept_tokens=0, **rest)


def _recomputed(
    sizes: _Sizes, budget: int, needs_hidden: bool, needs_weight: bool, widest: int
) -> dict:
    """Tiles of g, and the sums over them.

    With tokens first, dW [V, D] is summed over all tiles; else dH [T, D] is. The smaller of the two stays
    open: in fp32, or in twice 16 bits if fp32 would take more than half of the budget.
    """
    T, V, D, itemsize = sizes.T, sizes.V, sizes.D, sizes.dtype.itemsize
    tokens_first = V * needs_weight < T * needs_hidden
    open_rows = V * needs_weight if tokens_first else T * needs_hidden
    residual = itemsize < 4 and open_rows * D * 4 > budget // 2
    held = 0 if itemsize == 4 else open_rows * D * (itemsize if residual else 4)
    elements = max((budget - held) // itemsize, MIN_GPU_ELEMENTS)
    token_chunk = _fit(T, min(CHUNK_TOKENS, elements // 1024))  # 1 or more
    # The other sum is of one chunk or block at a time, and closed with it. It is fp32 too.
    chunk_sum = token_chunk * D * 4 * (needs_hidden and itemsize < 4)
    block_sum = D * 4 * (needs_weight and itemsize < 4 and token_chunk < T)
    if tokens_first and not residual:
        block_sum = 0  # products are added to the open sum in place
    columns = (budget - held - chunk_sum) // (token_chunk * itemsize + block_sum)
    vocab_block = min(_fit(V, max(columns, MIN_GPU_ELEMENTS // token_chunk)), widest)
    return {
        "token_chunk": token_chunk,
        "vocab_block": vocab_block,
        "tokens_first": tokens_first,
        "residual_sums": residual,
        "tile_bytes": token_chunk * vocab_block * itemsize,
        "sum_bytes": held + chunk_sum + vocab_block * block_sum,
    }


def _fit(size: int, limit: int) -> int:
    """The size of equal pieces of at most `limit`, in whole tiles; `size` itself if it is small enough."""
    if size <= limit:
        return max(1, size)
    most = max(limit // ROW_MULTIPLE, 1)
    pieces = -(-size // (most * ROW_MULTIPLE))
    return -(-size // (pieces * ROW_MULTIPLE)) * ROW_MULTIPLE
