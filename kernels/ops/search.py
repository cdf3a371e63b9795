"""A search for tiles, opt-in: DPO_FAST_TILE_SEARCH names the file where its findings are kept.

Without the variable the shipped table decides and nothing is timed. With it, the first call for each
key (device, triton, kernel, dtype, bins of D and V, options) runs the candidates on the tensors of that
call, leaves out those whose results are not the shipped tile's (`alike`), and times the others; later calls
and later runs read the file. Another tile changes the last bits of results, which is why neither the file
nor the search is ever used unasked.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from contextvars import copy_context
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch
import triton

from dpo_fast.kernels.alike import Results, difference, evidence
from dpo_fast.kernels.device import COMPILE_ONLY, arch_of
from dpo_fast.kernels.tiles import CANDIDATES, HALF_CONFIGS, TileConfig, bins, config_for

logger = logging.getLogger(__name__)
VARIABLE = "DPO_FAST_TILE_SEARCH"
COMPARED = "compared"  # of an entry of the file
MOST = 6  # candidates of a key: compiled side by side, they take well under a minute
# Launches with a tile, and returns a function that reads what the launch wrote.
Run = Callable[[TileConfig], Callable[[], Results]]


def choose_tile(
    kernel: str, device: torch.device, dtype: torch.dtype, D: int, V: int, run: Run, **flags: bool
) -> TileConfig:
    """The tile of `config_for`; with the search on, the fastest for this key that computes the same."""
    path = os.environ.get(VARIABLE)
    if not path:
        return config_for(arch_of(device), dtype, D, V, **flags)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    options = (flag for flag, value in sorted(flags.items()) if value)
    what = f"triton {triton.__version__}", kernel, str(dtype).removeprefix("torch.")
    key = "/".join([name, *what, *bins(D, V), *options])
    chosen = _tile(_read(Path(path)).get(key))
    if chosen is None:
        tiles = candidates(kernel, arch_of(device), dtype, D, V, **flags)
        times = time_all(kernel, tiles, run, device)
        chosen = min(times, key=times.get)
        if times[chosen] == float("inf"):
            return tiles[0]  # its launch tells what is wrong
        entry = {**asdict(chosen), "ms": times[chosen], "tried": len(times), COMPARED: True}
        _write(Path(path), _read(Path(path)) | {key: entry})
    return chosen


def _tile(entry: dict | None) -> TileConfig | None:
    """The tile of the file's entry; none where its results were not compared, or it has other fields."""
    names = {field.name for field in fields(TileConfig)}
    known = names | {"ms", "tried", COMPARED}
    if not entry or not entry.get(COMPARED) or set(entry) != known:
        return None
    return TileConfig(**{name: entry[name] for name in names})


def candidates(
    kernel: str, arch: str, dtype: torch.dtype, D: int, V: int, **flags: bool
) -> list[TileConfig]:
    """At most six tiles worth timing, the shipped one first; each runs as `config=` of its launcher.

    kernel: "rows" (`RowPass`) or "gradient" (`gradient_tile`, which always stores).
    arch, flags: as for `config_for`.
    """
    if kernel not in ("rows", "gradient"):
        raise ValueError(f"kernel={kernel!r} has no tiles; try 'rows' or 'gradient'")
    stores = flags.pop("stores", False) or kernel == "gradient"
    default = config_for(arch, dtype, D, V, stores=stores, **flags)
    if arch == "interpreter":
        return [default, replace(default, block_v=16), replace(default, block_d=16)]
    row = HALF_CONFIGS.get((arch, *bins(D, V)))
    kind = stores, flags.get("entropy", False)
    if row and default == row.choose(*kind):
        others = [row.choose(*kind) for row in CANDIDATES[arch, bins(D, V)[0]]]
    else:  # a layout, dtype or option with which other sizes would spill or not run
        others = [replace(default, group_t=group) for group in (8, 32)]
    return list(dict.fromkeys([default, *others]))[:MOST]


def time_all(
    kernel: str, tiles: list[TileConfig], run: Run, device: torch.device
) -> dict[TileConfig, float]:
    """Milliseconds of `run` by tile, the shipped one first.

    Infinite, and logged, for a tile that cannot be compiled or launched, or whose results differ.
    """
    _compile(tiles, run)
    times, shipped = dict.fromkeys(tiles, float("inf")), None
    for tile in tiles:
        try:
            results = run(tile)()
            found = evidence(results)
            if shipped is None:
                shipped = found
            if reason := difference(found, shipped):
                reason = f"its results are not the shipped tile's: {reason}"
            else:
                times[tile] = _median_ms(run, tile, device)
            if results.stored is not None:
                results.stored.fill_(torch.nan)  # what the next tile does not write shows
        except Exception as error:  # of whatever kind: the other tiles are still to be timed
            reason = (str(error) or repr(error)).splitlines()[0]
        if reason:
            logger.warning("the %s kernel of linear_logp cannot use %s: %s", kernel, tile, reason)
        if shipped is None:
            break  # nothing to hold the others against
    return times


def _compile(tiles: list[TileConfig], run: Run) -> None:
    """Compile for all tiles, side by side: the compiler does not hold Python's lock.

    The first by itself, so that what tiles share is known before there are threads. An error is left for
    the launch, which compiles again: Python 3.11's parser itself fails at times in threads.
    """

    def compile_one(tile: TileConfig) -> None:
        COMPILE_ONLY.set(True)
        with torch.no_grad():  # which a new thread does not inherit
            run(tile)

    with ThreadPoolExecutor(len(tiles)) as pool:
        first, *others = tiles
        wait([pool.submit(copy_context().run, compile_one, first)])
        wait([pool.submit(copy_context().run, compile_one, tile) for tile in others])


def _median_ms(run: Run, config: TileConfig, device: torch.device) -> float:
    if device.type == "cuda":
        return triton.testing.do_bench(lambda: run(config), return_mode="median")
    start = time.perf_counter()
    run(config)
    return 1e3 * (time.perf_counter() - start)


def _read(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}


def _write(path: Path, found: dict) -> None:
    """Not by dpo_fast.durable: this package imports nothing of the library, and ranks write at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(f".{os.getpid()}")
    aside.write_text(json.dumps(found, indent=1, sort_keys=True))
    aside.replace(path)
