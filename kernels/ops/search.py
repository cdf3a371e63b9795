"""A search for tiles, opt-in: DPO_FAST_TILE_SEARCH names the file where its findings are kept.

Without the variable the shipped table decides and nothing is timed. With it, the first call for each
key (device, kernel, dtype, bins of D and V, options) times the candidates on the tensors of that call;
later calls and later runs read the file. Another tile changes the last bits of results, which is why
neither the file nor the search is ever used unasked.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
import triton

from dpo_fast.kernels.device import arch_of
from dpo_fast.kernels.tiles import TileConfig, bins, config_for

VARIABLE = "DPO_FAST_TILE_SEARCH"


def choose_tile(
    kernel: str,
    device: torch.device,
    dtype: torch.dtype,
    D: int,
    V: int,
    run: Callable[[TileConfig], object],
    **flags: bool,
) -> TileConfig:
    """The tile of `config_for`; with the search on, the fastest for this key. run: launches with one."""
    path = os.environ.get(VARIABLE)
    if not path:
        return config_for(arch_of(device), dtype, D, V, **flags)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    options = (flag for flag, value in sorted(flags.items()) if value)
    key = "/".join([name, kernel, str(dtype).removeprefix("torch."), *bins(D, V), *options])
    found = _read(Path(path))
    if key not in found:
        tiles = candidates(kernel, arch_of(device), dtype, D, V, **flags)
        times = [(_median_ms(run, config, device), config) for config in tiles]
        best = min(times, key=lambda pair: pair[0])
        found = _read(Path(path)) | {key: {**asdict(best[1]), "ms": best[0], "tried": len(times)}}
        _write(Path(path), found)
    return TileConfig(**{k: v for k, v in found[key].items() if k not in ("ms", "tried")})


def candidates(
    kernel: str, arch: str, dtype: torch.dtype, D: int, V: int, **flags: bool
) -> list[TileConfig]:
    """At most six tiles worth timing, the shipped one first; each runs as `config=` of its launcher.

    kernel: "rows" (`RowPass`) or "gradient" (`gradient_tile`).
    arch, flags: as for `config_for`.
    """
    default = config_for(arch, dtype, D, V, **flags)
    if arch == "interpreter":
        return [default, replace(default, block_v=16), replace(default, block_d=16)]
    if not default.tma:
        others = [replace(default, num_stages=stages) for stages in (2, 3, 4)]
    else:
        sizes = [(128, 128, 2, 2), (128, 256, 3, 1), (128, 256, 4, 1), (256, 128, 3, 1)]
        others = [
            replace(default, block_t=t, block_v=v, num_stages=stages, per_sm=per_sm)
            for t, v, stages, per_sm in sizes
        ]
    return list(dict.fromkeys([default, *others]))[:6]


def _median_ms(run: Callable, config: TileConfig, device: torch.device) -> float:
    """Milliseconds of `run`; infinite for a tile that does not fit the device."""
    try:
        if device.type == "cuda":
            return triton.testing.do_bench(lambda: run(config), return_mode="median")
        start = time.perf_counter()
        run(config)
        return 1e3 * (time.perf_counter() - start)
    except triton.runtime.errors.OutOfResources:
        return float("inf")


def _read(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}


def _write(path: Path, found: dict) -> None:
    """Not by dpo_fast.durable: this package imports nothing of the library, and ranks write at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(f".{os.getpid()}")
    aside.write_text(json.dumps(found, indent=1, sort_keys=True))
    aside.replace(path)
