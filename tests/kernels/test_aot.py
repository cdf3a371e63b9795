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


def compiled(*options: str, path: str | None = None) -> list[dict]:
    """What `benchmarks.aot` prints. path: where another triton lies unpacked."""
    # A process of its own: this one has the interpreter in place of the compiler.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if path:
        environment["PYTHONPATH"] = os.pathsep.join([path, environment.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.aot", "--json", *options],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.fixture(scope="module")
def results():
    return compiled()


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
        return arch, *sizes, *launch

    launch = "num_warps", "num_stages", "tma"
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


def test_nothing_spills(results):
    for result in results:
        assert result["stack"] == 0 and result["local"] == 0, result


# Instructions of a thread between two tiles of 128 x 256, 8 warps. The exponentials alone are 512: a
# maximum, a fused multiply-add, an exponential and an addition for each of its 128 logits.
EPILOGUE = {
    ("rows_kernel", "plain"): 830,
    ("rows_kernel", "keep"): 930,
    ("rows_kernel", "entropy"): 1100,
    ("rows_kernel", "keep-entropy"): 1210,
    ("gradient_kernel", "plain"): 1100,
}


def epilogues(results: list[dict]) -> dict[tuple, int]:
    """The longest of each, in sm_90's wide tile."""
    found = {}
    for result in results:
        case = result["case"]
        key = case["kernel"], case["variant"]
        if case["arch"] == "sm_90" and case["sizes"][:3] == [128, 256, 64] and case["tma"]:
            found[key] = max(found.get(key, 0), result["straight"])
    return found


@pytest.mark.parametrize("key", EPILOGUE, ids=lambda key: "-".join(map(str, key)))
def test_the_epilogue_is_lean(results, key):
    assert epilogues(results)[key] <= EPILOGUE[key]


def test_triton_3_6_makes_code_as_lean():
    """The oldest triton that is supported; `.ci/run` unpacks it. The decisive cases, to take seconds."""
    path = os.environ.get("TRITON_36")
    if not path:
        pytest.skip(
            "TRITON_36 names no folder with triton 3.6.0: pip install --target, see .ci/run"
        )
    variants = sorted({variant for _, variant in EPILOGUE})
    kernels = sorted({kernel for kernel, _ in EPILOGUE})
    options = {"arch": ["sm_90"], "dtype": ["bf16"], "variant": variants, "kernel": kernels}
    words = [word for name, values in options.items() for x in values for word in (f"--{name}", x)]
    results = compiled(*words, path=path)
    assert {result["triton"] for result in results} == {"3.6.0"}
    found = epilogues(results)
    assert not {key: found[key] for key, most in EPILOGUE.items() if found[key] > most}
    for result in results:
        assert result["stack"] == result["local"] == result["serial"] == 0, result
        assert result["instruction"] == TENSOR_CORES["sm_90"], result
        assert result["shared"] <= SHARED_BYTES["sm_90"], result


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
