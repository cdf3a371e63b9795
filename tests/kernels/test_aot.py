"""Every shipped tile configuration becomes machine code without a GPU: no spills, and it fits."""

import itertools
import json
import os
import re
import subprocess
import sys

import pytest
import torch

from tests.support.paths import ROOT

pytest.importorskip("triton")

pytestmark = pytest.mark.processes
SHARED_BYTES = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10}  # opt-in, per block
TENSOR_CORES = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma"}


@pytest.fixture(scope="module")
def results():
    # A process of its own: this one has the interpreter in place of the compiler.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.aot", "--json"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_every_architecture_and_kernel_is_there(results):
    """Every kernel of every module: a new one without a case here fails."""
    kernels = set()
    for path in (ROOT / "kernels" / "ops").glob("*.py"):
        kernels |= set(re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.MULTILINE))
    assert len(kernels) >= 6
    for arch in SHARED_BYTES:
        names = {r["case"]["kernel"] for r in results if r["case"]["arch"] == arch}
        assert names == kernels


def test_every_shipped_configuration_is_there(results):
    from dpo_fast.kernels import tiles

    def key(config, arch):
        sizes = [config.block_t, config.block_v, config.block_d, config.group_t]
        launch = config.num_warps, config.num_stages, config.tma
        return arch, *sizes, *launch, config.subtiles

    launch = "num_warps", "num_stages", "tma", "subtiles"
    compiled = {
        (c["arch"], *c["sizes"], *(c[name] for name in launch))
        for c in (result["case"] for result in results)
        if c["kernel"] == "rows_kernel"
    }
    shipped = {
        key(config, names[0])
        for names, row in tiles.HALF_CONFIGS.items()
        for tile in (row.sums, row.stores, row.entropy)
        for config in (tile, tiles.repair_config(tile))
    }
    for arch in SHARED_BYTES:
        rich = tiles.config_for(arch, torch.bfloat16, 4096, 128_256, rich=True)
        for config in (rich, tiles.RICH_HALF, tiles.FLOAT):
            shipped |= {key(config, arch), key(tiles.repair_config(config), arch)}
    shipped |= {key(tiles.OTHER_HALF, "sm_80"), key(tiles.POINTER_HALF, "sm_90")}
    shipped.add(key(tiles.POINTER_HALF, "sm_100"))
    assert shipped <= compiled


def test_every_candidate_of_the_search_is_there(results):
    """Both kernels. Candidates that differ in the order of tiles alone are compiled once."""
    from dpo_fast.kernels import search

    compiled = {
        (c["kernel"], c["arch"], *c["sizes"][:3], c["num_warps"], c["num_stages"], c["tma"])
        for c in (result["case"] for result in results)
    }
    for arch, D, kernel in itertools.product(SHARED_BYTES, (896, 4096), ("rows", "gradient")):
        for tile in search.candidates(kernel, arch, torch.bfloat16, D, 128_256, stores=True):
            sizes = tile.block_t, tile.block_v, tile.block_d
            case = f"{kernel}_kernel", arch, *sizes, tile.num_warps, tile.num_stages, tile.tma
            assert case in compiled


def test_programs_of_a_multiprocessor_fit_it_together(results):
    """Where a grid counts on two, one must run its epilogue under the other's products."""
    seen = 0
    for result in results:
        case = result["case"]
        if case["arch"] == "sm_90" and case["per_sm"] > 1 and _is_pair(case):
            seen += 1
            registers = -(-result["registers"] // 8) * 8 * 32 * case["num_warps"]
            assert registers * case["per_sm"] <= 65_536, result
            assert (result["shared"] + 1024) * case["per_sm"] <= 228 << 10, result
    assert seen


def _is_pair(case):
    """Of the table of tiles. Repairs, and options that need all registers, overlap nothing."""
    return not any(name in case["variant"] for name in ("repair", "full", "top1"))


def test_nothing_spills(results):
    for result in results:
        assert result["stack"] == 0 and result["local"] == 0, result


# Instructions of a thread between two tiles of 128 x 256, 8 warps. The exponentials alone are 512: a
# maximum, a fused multiply-add, an exponential and an addition for each of its 128 logits.
EPILOGUE = {"plain": 830, "keep": 930, "entropy": 1100, "keep-entropy": 1210}


@pytest.mark.parametrize("variant", EPILOGUE)
def test_the_epilogue_is_lean(results, variant):
    found = [
        r["straight"]
        for r in results
        if (r["case"]["kernel"], r["case"]["variant"], r["case"]["arch"])
        == ("rows_kernel", variant, "sm_90")
        and r["case"]["sizes"][:3] == [128, 256, 64]
    ]
    assert found and max(found) <= EPILOGUE[variant], found


def test_products_of_a_stage_are_in_flight_together(results):
    """A branch on the accumulators makes ptxas wait for every single product, and says nothing."""
    for result in results:
        if result["case"]["tma"]:
            assert result["serial"] == 0, result


def test_shared_memory_fits(results):
    for result in results:
        assert result["shared"] <= SHARED_BYTES[result["case"]["arch"]], result


def test_half_products_use_tensor_cores(results):
    for result in results:
        case = result["case"]
        if case["kernel"] in ("rows_kernel", "gradient_kernel") and case["dtype"] != "fp32":
            assert result["instruction"] == TENSOR_CORES[case["arch"]], result


def test_descriptors_become_bulk_copies(results):
    assert any(result["case"]["tma"] for result in results)
    for result in results:
        assert result["tma"] == result["case"]["tma"], result
