"""Which tile a product kernel runs with: a shipped table with binned keys."""

from __future__ import annotations

import functools
import itertools
import logging
from dataclasses import dataclass, replace

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TileConfig:
    """Sizes of one launch of a product kernel.

    group_t: token tiles that go through the vocabulary together, so that the hidden states of a group
    and the weight columns in flight stay in the L2 cache.
    per_sm: programs of a persistent grid on each multiprocessor; 0 starts one program per tile.
    tma: operands and stored tiles through tensor descriptors; needs a layout that `describable` takes.
    """

    block_t: int
    block_v: int
    block_d: int
    num_warps: int
    num_stages: int
    group_t: int = 16
    per_sm: int = 0
    tma: bool = False


def _persistent(*sizes: int, per_sm: int) -> TileConfig:
    return TileConfig(*sizes, per_sm=per_sm, tma=True)


@dataclass(frozen=True)
class Tiles:
    """One row of the table.

    sums: for a kernel that writes row sums alone.
    stores: for one that stores a tile of [T, V] as well, which takes shared memory.
    entropy: for either with the entropy, which takes registers.
    """

    sums: TileConfig
    stores: TileConfig
    entropy: TileConfig

    def choose(self, stores: bool, entropy: bool) -> TileConfig:
        return self.entropy if entropy else self.stores if stores else self.sums


def _all(tile: TileConfig, **other: int) -> Tiles:
    return Tiles(*[replace(tile, **other)] * 3)


# Keyed by (architecture, D bin, V bin), never by T, which changes with every batch. An H100's clock chose
# those of sm_90 (docs/LOG.md, 2026-11-26): the wide tile is the fastest for every D. A pair of 128 x 128 on
# a multiprocessor hides one's epilogue under the other's products, but reads a third more through L2, and
# lost by 20 % at D 896 and by 40 % at D 4096. Registers and shared memory chose the others.
_SM90 = Tiles(
    _persistent(128, 256, 64, 8, 4, per_sm=1),
    _persistent(128, 256, 64, 8, 3, per_sm=1),
    _persistent(128, 256, 64, 8, 3, per_sm=1),
)
_SM100 = Tiles(
    _persistent(256, 128, 64, 8, 4, per_sm=1),
    _persistent(256, 128, 64, 8, 3, per_sm=1),
    _persistent(128, 128, 64, 8, 4, per_sm=1),
)
HALF_CONFIGS = {
    ("sm_80", "small", "small"): Tiles(
        TileConfig(128, 64, 32, 4, 4), TileConfig(128, 64, 32, 4, 4), TileConfig(128, 128, 32, 8, 4)
    ),
    ("sm_80", "small", "large"): _all(TileConfig(128, 128, 32, 8, 4)),
    ("sm_80", "large", "small"): _all(TileConfig(128, 128, 32, 8, 4)),
    ("sm_80", "large", "large"): _all(TileConfig(128, 128, 64, 8, 3)),
}
for _d, _v in itertools.product(("small", "large"), repeat=2):
    HALF_CONFIGS |= {("sm_90", _d, _v): _SM90, ("sm_100", _d, _v): _SM100}
# What a card may find faster than the table, by (architecture, D bin), best guess first. 256 x 128 has half
# as many columns to reduce for the same traffic. group_t moves traffic between the hidden states and the
# weight.
_TALL = Tiles(
    _persistent(256, 128, 64, 8, 4, per_sm=1),
    _persistent(256, 128, 64, 8, 3, per_sm=1),
    _persistent(256, 128, 64, 8, 3, per_sm=1),
)


def _groups(row: Tiles) -> list[Tiles]:
    return [Tiles(*[replace(tile, group_t=n) for tile in vars(row).values()]) for n in (8, 32)]


CANDIDATES = {
    ("sm_80", "small"): [_all(TileConfig(128, 64, 32, 4, 4)), _all(TileConfig(128, 128, 32, 8, 4))],
    ("sm_80", "large"): [
        _all(TileConfig(128, 128, 64, 8, 3)),
        _all(TileConfig(128, 128, 32, 8, 4)),
    ],
    ("sm_90", "small"): [_TALL, *_groups(_SM90)],
    ("sm_90", "large"): [_TALL, *_groups(_SM90)],
    ("sm_100", "small"): [_all(_SM100.entropy), *_groups(_SM100)],
    ("sm_100", "large"): [_all(_SM100.entropy), *_groups(_SM100)],
}
POINTER_HALF = TileConfig(128, 128, 64, 8, 3)  # sm_90 and later, layouts without a descriptor
OTHER_HALF = TileConfig(64, 128, 32, 4, 3)  # 36 KiB: fits sm_86, sm_89, sm_120 and others
RICH_HALF = TileConfig(128, 64, 64, 8, 3)  # any option at once spills registers above this
FLOAT = TileConfig(64, 64, 16, 4, 3)  # fp32 products in full precision use no tensor cores
INTERPRETER = TileConfig(16, 32, 32, 1, 1, group_t=2)
INTERPRETER_TMA = replace(INTERPRETER, per_sm=2, tma=True)


def bins(D: int, V: int) -> tuple[str, str]:
    return "small" if D <= 1024 else "large", "small" if V <= 32768 else "large"


def config_for(
    arch: str,
    dtype: torch.dtype,
    D: int,
    V: int,
    *,
    stores: bool = False,
    entropy: bool = False,
    rich: bool = False,
    described: bool = True,
) -> TileConfig:
    """The shipped configuration.

    arch: "sm_90" or the like, or "interpreter".
    stores, entropy: what the kernel writes beside row sums.
    rich: it has a bias, a soft cap, or more sums than the entropy.
    described: every operand has a layout for a tensor descriptor.
    """
    if arch == "interpreter":
        return INTERPRETER_TMA if described and not rich else INTERPRETER
    if dtype == torch.float32:
        return FLOAT
    described = described and arch in ("sm_90", "sm_100")
    if rich:
        rich_half = RICH_HALF if arch.startswith("sm_") else OTHER_HALF
        return replace(rich_half, per_sm=2, tma=True) if described else rich_half
    key = arch, *bins(D, V)
    if key not in HALF_CONFIGS:
        return OTHER_HALF
    config = HALF_CONFIGS[key].choose(stores, entropy)
    return POINTER_HALF if config.tma and not described else config


def repair_config(config: TileConfig) -> TileConfig:
    """The tile for the few rows done again: as many columns, fewer rows, through pointers.

    A descriptor cannot mask rows, and fewer of them let masks fit the registers.
    """
    rows = min(64, max(16, config.block_t // 2))
    return replace(config, block_t=rows, num_stages=2, per_sm=2, tma=False)


def describable(*tensors: Tensor) -> bool:
    """Whether a tensor descriptor can address all: contiguous elements in rows that are 16-byte aligned."""
    return all(
        x.stride(-1) == 1
        and x.stride(0) * x.element_size() % 16 == 0
        and x.data_ptr() % 16 == 0
        and 0 not in x.shape
        for x in tensors
    )


def say_layouts(kernel: str, **tensors: Tensor) -> None:
    """Say once of each tensor that has no descriptor's layout how it is read, and why.

    Views, weights in a flat buffer and transposed heads are such. They are read where they lie, through
    pointers, and never copied.
    """
    for name, x in tensors.items():
        if reason := _why_not_described(x):
            _say_once(kernel, name, str(x.dtype), reason)


def _why_not_described(x: Tensor) -> str | None:
    if 0 in x.shape:
        return None
    if x.stride(-1) != 1:
        return f"neighbours in a row are {x.stride(-1)} elements apart"
    if x.stride(0) * x.element_size() % 16:
        return f"rows are {x.stride(0) * x.element_size()} bytes apart, no multiple of 16"
    if x.data_ptr() % 16:
        return f"it begins {x.data_ptr() % 16} bytes off a multiple of 16"
    return None


@functools.cache
def _say_once(kernel: str, name: str, dtype: str, reason: str) -> None:
    logger.info(
        "the %s kernel of linear_logp reads %s (%s) through pointers, not a tensor descriptor: %s",
        kernel,
        name,
        dtype,
        reason,
    )


def programs(config: TileConfig, tiles: int, device: torch.device) -> int:
    """Programs of the grid: all tiles, or as many as the device runs at a time."""
    if not config.per_sm:
        return tiles
    return max(1, min(tiles, config.per_sm * _multiprocessors(device)))


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1  # the interpreter runs programs one after another
    return torch.cuda.get_device_properties(device).multi_processor_count
