"""csrc without a GPU: what the compiler makes of it, the host's planning, and the protocol under any order.

The kernel's mathematics is in tests/ops/test_linear_logp_cuda.py.
"""

import itertools
import math
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode

from dpo_fast.errors import UnavailableError
from dpo_fast.ops import dispatch, linear_logp
from dpo_fast.ops.dispatch import choose_implementation, why_not_cuda
from dpo_fast.ops.linear_logp import cuda_extension, op
from tests.support import emulated_sm90
from tests.support.paths import ROOT

linear_logp_cuda = pytest.importorskip("dpo_fast.ops.linear_logp.cuda")
CPU, BF16 = torch.device("cpu"), torch.bfloat16
needs_nvcc = pytest.mark.skipif(cuda_extension.find_nvcc() is None, reason="needs nvcc")
needs_compiler = pytest.mark.skipif(
    emulated_sm90.why_not() is not None, reason=str(emulated_sm90.why_not())
)


# What the compiler makes of it.


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """Built as on first use, in a cache of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path_factory.mktemp("extensions")))
        yield cuda_extension.build()


def tool(name: str) -> str:
    """A program of the toolkit that the triton wheel carries."""
    triton = pytest.importorskip("triton")
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


@pytest.fixture(scope="module")
def machine_code(library, tmp_path_factory):
    """{kernel: its disassembly}."""
    folder = tmp_path_factory.mktemp("cubin")
    subprocess.run([tool("cuobjdump"), "-xelf", "all", library], cwd=folder, check=True)
    found = {}
    for cubin in folder.glob("*.cubin"):
        assert "sm_90a" in cubin.name
        run = subprocess.run([tool("nvdisasm"), cubin], capture_output=True, text=True, check=True)
        parts = re.split(r"^\.text\.(\S+):", run.stdout, flags=re.M)
        found |= dict(zip(parts[1::2], parts[2::2]))
    return found


KERNELS = {
    "SumRowsILb0ELb0E": "sums",
    "SumRowsILb0ELb1E": "sums, extras",
    "SumRowsILb1ELb0E": "kept",
    "SumRowsILb1ELb1E": "kept, extras",
    "MakeGradient": "gradient",
}


def products(machine_code: dict) -> dict[str, str]:
    return {
        name: next(code for symbol, code in machine_code.items() if part in symbol)
        for part, name in KERNELS.items()
    }


@pytest.mark.emulator
@needs_nvcc
def test_nothing_spills_and_ptxas_warns_of_nothing(library):
    log = (library.parent / cuda_extension.LOG).read_text()
    assert log.count("Compiling entry function") == len(KERNELS) + 1
    assert len(re.findall(r"^ +0 bytes stack frame, 0 bytes spill", log, re.M)) == len(KERNELS) + 1
    assert "warning" not in log.lower() and cuda_extension.complaints(log) == []
    entry = 65536 // linear_logp_cuda.sizes()["kThreads"] // 8 * 8
    assert len(re.findall(rf"Used {entry} registers", log)) == len(KERNELS)


@pytest.mark.processes
@needs_nvcc
def test_the_machine_code_is_hoppers(machine_code):
    """wgmma at the tile's width, TMA in and out, multicast, registers moved between warps."""
    width = linear_logp_cuda.sizes()["kBlockV"]
    for name, code in products(machine_code).items():
        shapes = set(re.findall(r"\bHGMMA\.(\S+)", code))
        assert shapes == {f"64x{width}x16.F32.BF16"}, name
        assert not re.search(r"\bHMMA\b|\bSTL\b|\bLDL\b", code), name
        assert re.search(r"\bUTMALDG\.2D ", code) and "UTMALDG.2D.MULTICAST" in code, name
        assert ("UTMASTG.2D" in code) == (not name.startswith("sums")), name
        assert "USETMAXREG.DEALLOC" in code and "USETMAXREG.TRY_ALLOC" in code, name
    assert not any("UTMALDG" in code for symbol, code in machine_code.items() if "finish" in symbol)


@pytest.mark.processes
@needs_nvcc
def test_products_are_issued_in_a_row(machine_code):
    """Between the wgmmas of one stage nothing waits: two halves times four steps, one wait behind them."""
    for name, code in products(machine_code).items():
        order = re.findall(r"\b(HGMMA|WARPGROUP\.DEPBAR)", code)
        runs = [len(list(group)) for key, group in itertools.groupby(order) if key == "HGMMA"]
        assert runs and all(run % 8 == 0 for run in runs), (name, runs)


@pytest.mark.processes
@needs_nvcc
def test_no_fence_of_the_whole_gpu_in_a_loop(machine_code):
    """A release to the cluster compiles to one. Those of the two cluster barriers are outside of it."""
    for name, code in products(machine_code).items():
        fences = [line for line in code.splitlines() if "MEMBAR.ALL.GPU" in line]
        assert len(fences) == 2, name
        loop = code[code.index("HGMMA") : code.rindex("HGMMA")]
        assert "MEMBAR.ALL.GPU" not in loop, name


@pytest.mark.processes
@needs_nvcc
def test_the_library_asks_torch_for_its_stable_c_interface_alone(library):
    text = subprocess.run(
        ["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True
    ).stdout
    names = set(re.findall(r"[Uw] (\S+)", text))
    ours = {name for name in names if re.search("torch|c10|_ZN2at", name)}
    # The one function that came with 2.10; torch's list of shim functions has the others as older.
    assert {name for name in ours if not name.startswith("aoti_torch_")} == {"torch_library_impl"}
    assert not any(name.startswith("_Z") and re.search("torch|c10|N2at", name) for name in names)
    assert not any(name.startswith("cu") for name in names)  # neither libcuda nor libcudart


def in_another_process(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=120,
    )


@pytest.mark.processes
@needs_nvcc
def test_the_bindings_load_and_name_what_does_not_fit(library):
    """The library loads beside torch's wheel without CUDA, and every check comes before a launch."""
    done = in_another_process(
        f"""
        import torch
        torch.ops.load_library({str(library)!r})
        rows = torch.ops.dpo_fast_sm90.rows
        T, V, D = 130, 200, 16
        good = dict(hidden=torch.zeros(T, D, dtype=torch.bfloat16), offset=torch.zeros(T), kept=None,
                    weight=torch.zeros(V, D, dtype=torch.bfloat16), repair=None, factor=1.0,
                    targets=torch.zeros(T, dtype=torch.int64), partials=torch.zeros(2, 2, T),
                    score=torch.zeros(T), shift=torch.zeros(T),
                    maximum=torch.zeros(T), total=torch.zeros(T),
                    weighted=None, squares=None, cluster=2, blocks=2)
        half = torch.bfloat16
        changes = dict(
            device=dict(),
            shapes=dict(weight=torch.zeros(V, 24, dtype=half)),
            dtype=dict(hidden=torch.zeros(T, D)),
            stride=dict(hidden=torch.zeros(T, 20, dtype=half)[:, :D]),
            address=dict(hidden=torch.zeros(T * D + 8, dtype=half)[1:-7].view(T, D)),
            empty=dict(hidden=torch.zeros(0, D, dtype=half)),
            targets=dict(targets=torch.zeros(T, dtype=torch.int32)),
            partials=dict(partials=torch.zeros(2, 3, T)),
            planes=dict(weighted=torch.zeros(T), squares=torch.zeros(T)),
            kept=dict(kept=torch.zeros(T, V, dtype=half)[:, :V - 1]),
            offset=dict(offset=torch.zeros(T - 1)),
            repair=dict(repair=torch.zeros(3, dtype=torch.int8)),
            cluster=dict(cluster=3),
            blocks=dict(blocks=3),
        )
        for name, change in changes.items():
            try:
                rows(**(good | change))
            except RuntimeError as error:
                print(name, "|", str(error).splitlines()[0])
        try:
            torch.ops.dpo_fast_sm90.gradient(
                good["hidden"], good["weight"], good["targets"], 1.0, good["score"], good["total"],
                good["total"][1:], 0, torch.zeros(T, 200, dtype=half), 2, 2)
        except RuntimeError as error:
            print("gradient", "|", str(error).splitlines()[0])
        """
    )
    assert done.returncode == 0, done.stderr
    said = dict(line.split(" | ", 1) for line in done.stdout.splitlines())
    expected = {
        "device": "hidden must be on the CUDA device of hidden.*-1: a CPU",
        "shapes": r"\[T, D\] and \[V, D\]; got sizes \[130, 16\].*sizes \[200, 24\]",
        "dtype": r"hidden: expected bf16 \[130, 16\].*dtype Float",
        "stride": r"hidden: .*rows at multiples of 16 bytes; got sizes \[130, 16\], strides \[20, 1\]",
        "address": r"hidden: .*address \d+",
        "empty": "T, V and D must be in 1.*; got 0, 200, 16",
        "targets": r"targets: expected contiguous Long \[130\]; got .*dtype Int",
        "partials": r"partials: expected contiguous Float \[2, 2, 130\]; got sizes \[2, 3, 130\]",
        "planes": r"partials: expected contiguous Float \[4, 2, 130\]",
        "kept": r"kept: expected bf16 \[130, 200\].*sizes \[130, 199\]",
        "offset": r"offset: expected contiguous Float \[130\]; got sizes \[129\]",
        "repair": r"repair: expected contiguous Char \[2\]; got sizes \[3\]",
        "cluster": "cluster=3 must be 1 or 2",
        "blocks": "blocks=3 a multiple",
        "gradient": r"per_p: expected contiguous Float \[130\]; got sizes \[129\]",
    }
    assert said.keys() == expected.keys()
    for name, pattern in expected.items():
        assert re.search(pattern, said[name]), (name, said[name])


@pytest.mark.processes
def test_the_commands_for_a_gpu_select_tests():
    """Those of csrc/README.md: pytest's -k knows no commas, and an id has no underscores."""
    commands = (cuda_extension.SOURCES / "README.md").read_text()
    for wanted in set(re.findall(r'-k "([^"]+)"', commands)):
        run = subprocess.run(
            [
                sys.executable,
                "-m",
                "pytest",
                "--collect-only",
                "-q",
                "-p",
                "no:cacheprovider",
                "tests/ops/test_linear_logp_cuda.py",
                "-k",
                wanted,
            ],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert run.returncode == 0 and "test_matches_definition" in run.stdout, run.stderr
        assert "128256" not in run.stdout


# Planning on the host.


def test_sizes_are_read_from_the_header():
    sizes = linear_logp_cuda.sizes()
    assert {"kBlockT", "kBlockV", "kBlockD", "kMaxCluster", "kGroupUnits", "kThreads"} == set(sizes)


@pytest.mark.parametrize("multiprocessors", [1, 2, 7, 114, 132])
@pytest.mark.parametrize("T", [1, 128, 129, 300, 1024, 1025, 4096, 1_000_000])
@pytest.mark.parametrize("V", [1, 192, 193, 151_936])
def test_every_launch_covers_every_tile(T, V, multiprocessors):
    launch = linear_logp_cuda.plan_launch(T, V, multiprocessors)
    sizes = linear_logp_cuda.sizes()
    assert launch.cluster <= min(sizes["kMaxCluster"], multiprocessors)
    assert 0 < launch.blocks <= multiprocessors and launch.blocks % launch.cluster == 0
    assert (launch.units_t - 1) * launch.tokens_per_unit < T
    assert launch.units_t * launch.tokens_per_unit >= T
    assert (launch.tiles_v - 1) * sizes["kBlockV"] < V <= launch.tiles_v * sizes["kBlockV"]
    # No block is idle that could work, and few work for tokens that are not there.
    assert launch.blocks + launch.cluster > min(
        launch.units_t * launch.tiles_v * launch.cluster, multiprocessors
    )
    wasted = launch.units_t * launch.cluster - -(-T // sizes["kBlockT"])
    assert wasted * linear_logp_cuda.MANY_TILES <= -(-T // sizes["kBlockT"])


def test_few_tokens_fill_the_device():
    """Every tile of V is a split: 100 tokens and a real vocabulary keep every multiprocessor busy."""
    launch = linear_logp_cuda.plan_launch(100, 128_256, 132)
    assert launch.blocks == 132 and launch.units_t * launch.tiles_v > 132


def test_repair_flags_name_the_units_with_wrong_rows():
    launch = linear_logp_cuda.plan_launch(600, 192, 132)
    wrong = torch.zeros(600, dtype=torch.bool)
    assert linear_logp_cuda.repair_flags(wrong, launch).tolist() == [0] * (1 + launch.units_t)
    wrong[[3, 599]] = True
    flags = linear_logp_cuda.repair_flags(wrong, launch)
    assert flags.dtype == torch.int8
    assert flags.tolist() == [1, 1] + [0] * (launch.units_t - 2) + [1]


@pytest.mark.emulator
@needs_compiler
@pytest.mark.parametrize(("units_t", "tiles_v"), [(1, 1), (1, 7), (5, 3), (8, 4), (9, 4), (37, 11)])
def test_the_order_of_the_tiles_visits_each_once(units_t, tiles_v):
    """The kernel's own function; within a group units of T vary fastest, as in the Triton twin."""
    unit_of = emulated_sm90.emulated().library.unit_of
    found = [divmod(unit_of(i, units_t, tiles_v), tiles_v) for i in range(units_t * tiles_v)]
    assert len(set(found)) == units_t * tiles_v
    group = linear_logp_cuda.sizes()["kGroupUnits"]
    expected = []
    for first in range(0, units_t, group):
        rows = range(first, min(first + group, units_t))
        expected += [(t, v) for v in range(tiles_v) for t in rows]
    assert found == expected


# The protocol.

# Each makes the kernel wrong in one place; the emulation has to notice. Those of the ring, the cluster,
# the copy engine and the layouts.
MUTANTS = {
    "a stage is not waited for": (
        "product_sm90.cuh",
        "    wait(&shared.full[ring.stage], ring.parity);\n",
        "",
    ),
    "a consumer takes its turn unasked": (
        "product_sm90.cuh",
        "      wait(&shared.turn[consumer], turn);\n",
        "",
    ),
    "a stage is given back before it was read": (
        "product_sm90.cuh",
        "release(shared, last, thread, cluster)",
        "release(shared, ring.stage, thread, cluster)",
    ),
    "the other block is not told": ("product_sm90.cuh", "if (lane < cluster)", "if (lane < 1)"),
    "a block ends before the others": (
        "product_sm90.cuh",
        "  cluster_sync();  // a block",
        "  // a block",
    ),
    "the copy engine sees old bytes": ("product_sm90.cuh", "    fence_async_proxy();\n", ""),
    "accumulators are read too early": ("product_sm90.cuh", "      wait_products<0>();\n", ""),
    "stores are not swizzled": ("layout.cuh", "(byte ^ (row % 8 * 16))", "byte"),
}


def exercise(operations) -> None:
    """Several orders of events on shapes with a cluster, more steps than stages and ragged ends."""
    torch.manual_seed(0)
    T, V, D = 250, 400, 392
    hidden, weight = torch.randn(T, D).to(BF16), torch.randn(V, D).to(BF16)
    targets, logits = torch.randint(V, (T,)), hidden.double() @ weight.double().t() * 0.1
    given = (logits.amax(1) / math.log(2)).float()
    names = ("offset", "score", "shift", "maximum", "total")
    sums = {name: torch.empty(T) for name in names}
    partials = torch.empty(2, -(-V // 192), T)
    for order in range(6):
        kept = torch.full((T, V), torch.nan, dtype=BF16)
        for tensor in (*sums.values(), partials):
            tensor.fill_(torch.nan)
        if order % 2:
            sums["offset"].copy_(given)
        operations.rows(
            hidden,
            weight,
            targets,
            0.1,
            repair=None,
            partials=partials,
            weighted=None,
            squares=None,
            cluster=2,
            blocks=2,
            kept=kept if order % 2 else None,
            **sums,
        )
        torch.testing.assert_close(sums["offset"], given, rtol=1e-6, atol=1e-6)
        # Another product rounds another way: all are held against the offset that was used.
        z = logits / math.log(2)
        expected = (z - sums["offset"].double()[:, None]).exp2()
        close = {"rtol": 1e-4, "atol": 1e-4, "check_dtype": False}
        torch.testing.assert_close(sums["total"], expected.sum(1), **close)
        torch.testing.assert_close(sums["maximum"], z.amax(1), **close)
        target = z.gather(1, targets[:, None])[:, 0]
        torch.testing.assert_close(sums["shift"], target - sums["offset"].double(), **close)
        torch.testing.assert_close(sums["score"] * (0.1 / math.log(2)), target, **close)
        if order % 2:
            torch.testing.assert_close(kept, expected, rtol=2**-7, atol=1e-4, check_dtype=False)


@pytest.mark.emulator
@needs_compiler
@pytest.mark.parametrize("seed", range(6))
def test_any_order_of_events_gives_the_right_sums(seed):
    """Slow blocks, slow warps, long copies: no deadlock, nothing read or overwritten too early."""
    exercise(emulated_sm90.Emulated(emulated_sm90.emulated().library._name, 100 * seed))


@pytest.mark.emulator
@needs_compiler
@pytest.mark.parametrize("name", MUTANTS)
def test_the_emulation_notices(name, tmp_path):
    operations = emulated_sm90.Emulated(emulated_sm90.build(tmp_path, (MUTANTS[name],)))
    with pytest.raises((RuntimeError, AssertionError)) as error:
        for seed in range(8):
            operations.seeds = itertools.count(1000 * seed)
            exercise(operations)
    assert "refuses" not in str(error.value)


# Who may use it.


def test_a_name_that_cannot_run_is_an_error():
    hidden, weight = torch.zeros(2, 8, dtype=BF16), torch.zeros(16, 8, dtype=BF16)
    targets = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(
        UnavailableError, match="'cuda' cannot run linear_logp here: .*H100.*'auto'"
    ):
        linear_logp(hidden, weight, targets, implementation="cuda")
    for operation in ("logits_logp", "preference"):
        with pytest.raises(UnavailableError, match=f"{operation} here: csrc has linear_logp alone"):
            choose_implementation(operation, CPU, BF16, "cuda")


@pytest.mark.parametrize(
    ("capability", "dtype", "message"),
    [
        ((8, 0), BF16, r"9\.0 \(H100, H200\), this is 8\.0"),
        ((10, 0), BF16, r"this is 10\.0"),
        ((9, 0), torch.float16, "takes torch.bfloat16, not torch.float16"),
    ],
)
def test_why_not_on_other_gpus(capability, dtype, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    reason = why_not_cuda("linear_logp", torch.device("cuda"), dtype)
    assert re.search(message, reason) and "'triton'" in reason


@pytest.mark.parametrize("built", [False, True])
@pytest.mark.parametrize("small", [False, True])
def test_auto_takes_it_for_small_heads_where_it_is_built(built, small, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(cuda_extension, "built", lambda: tmp_path if built else None)
    monkeypatch.setattr(cuda_extension, "build", lambda: pytest.fail("auto builds nothing"))
    dispatch._logged_choice.cache_clear()
    choice = choose_implementation("linear_logp", torch.device("cuda"), BF16, small=small)
    dispatch._logged_choice.cache_clear()
    assert choice.name == ("cuda" if built and small else "triton")


@pytest.mark.parametrize("requested", ["auto", "triton"])
def test_a_call_under_auto_says_whether_its_head_is_small(requested, monkeypatch):
    asked = []

    def choose(operation, device, dtype, requested, small):
        asked.append((operation, requested, small))
        return dispatch.Choice("cuda", "the test says so")

    monkeypatch.setattr(op, "choose_implementation", choose)
    monkeypatch.setattr(linear_logp_cuda, "serves_small", lambda *head: True)
    hidden, weight = torch.zeros(3, 8), torch.zeros(5, 8)
    assert op.implementation_of(hidden, weight, None, None, requested) == "cuda"
    assert asked == [("linear_logp", requested, requested == "auto")]


def test_a_small_head_is_one_that_it_serves():
    def serves(T=4, D=896, V=32, dtype=BF16, bias=None, softcap=None, on="cuda"):
        with FakeTensorMode():
            hidden, weight = (torch.empty(n, D, dtype=dtype, device=on) for n in (T, V))
            return linear_logp_cuda.serves_small(hidden, weight, bias, softcap)

    with pytest.MonkeyPatch.context() as patch:  # a fake tensor has no address
        patch.setattr(linear_logp_cuda, "_why_not_described", lambda name, x: None)
        assert serves() and serves(D=1024)
        assert not any([serves(D=1032), serves(dtype=torch.float16), serves(softcap=3.0)])
        assert not serves(bias=torch.zeros(32)) and not serves(on="cpu")
