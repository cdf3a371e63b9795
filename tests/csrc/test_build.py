"""csrc's library on its way to the cache: built once, found again, and what is said where that fails."""

import re
import shutil
import signal
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dpo_fast.errors import UnavailableError
from dpo_fast.ops.linear_logp import cuda_extension
from tests.support.paths import ROOT


@pytest.fixture
def fake_nvcc(tmp_path, monkeypatch):
    """A compiler that writes a line for each run and makes what it is told to: its log, its exit code."""

    def install(log: str = "", code: int = 0) -> Path:
        home = tmp_path / "cuda"
        (home / "bin").mkdir(parents=True, exist_ok=True)
        nvcc = home / "bin" / "nvcc"
        script = f"""\
            #!{sys.executable}
            import pathlib, sys, time
            if "--version" in sys.argv:
                print("Cuda compilation tools, release 13.0, V13.0.1")
                sys.exit()
            with open({str(tmp_path / "runs")!r}, "a") as runs:
                runs.write("run\\n")
            time.sleep(0.2)
            print({log!r})
            if {code} == 0:
                pathlib.Path(sys.argv[sys.argv.index("-o") + 1]).write_text("library")
            sys.exit({code})
            """
        nvcc.write_text(textwrap.dedent(script))
        nvcc.chmod(0o755)
        monkeypatch.setenv("CUDA_HOME", str(home))
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
        return tmp_path / "runs"

    return install


def test_built_once_and_found_again_by_what_it_is_made_of(fake_nvcc, monkeypatch, tmp_path):
    runs = fake_nvcc()
    first = cuda_extension.build()
    assert cuda_extension.build() == first and runs.read_text() == "run\n"
    assert first.parent.name.endswith("-nvcc13.0.1")
    sources = tmp_path / "csrc"
    sources.mkdir()
    for path in cuda_extension.sources():
        (sources / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(cuda_extension, "SOURCES", sources)
    assert cuda_extension.build() == first
    with (sources / "layout.cuh").open("a") as file:
        file.write("// another\n")
    assert cuda_extension.build() != first and runs.read_text() == "run\nrun\n"
    monkeypatch.setattr(cuda_extension, "find_nvcc", lambda: None)  # built ahead, run without nvcc
    assert cuda_extension.build().parent.name.endswith("-nvcc13.0.1")
    assert cuda_extension.why_not() is None


# What of torch's stable interface the bindings use: each is in the headers of 2.10, 2.11 and 2.13. One that
# newer headers alone have builds here, and not beside the torch of a machine with a card.
IN_EVERY_TORCH = {
    *("STD_TORCH_CHECK", "STABLE_TORCH_LIBRARY", "STABLE_TORCH_LIBRARY_IMPL", "TORCH_BOX"),
    *("AOTI_TORCH_SUCCESS", "aoti_torch_get_current_cuda_stream"),
    *("torch::headeronly::ScalarType", "torch::headeronly::toString", "torch::stable::Tensor"),
    "torch::stable::accelerator::DeviceGuard",
}


def test_the_bindings_use_what_every_supported_torch_has():
    text = re.sub(r"//.*", "", (cuda_extension.SOURCES / "bindings.cpp").read_text())
    names = r"\b(?:[A-Z_]*TORCH_[A-Z_]+|aoti_torch_\w+|torch::(?:headeronly|stable)[\w:]*\w)"
    assert set(re.findall(names, text)) == IN_EVERY_TORCH


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.skipif(
    cuda_extension.find_nvcc() is None or shutil.which("objdump") is None,
    reason="needs nvcc and objdump",
)
def test_the_library_loads_with_glibc_of_2021():
    """Of Ubuntu 22.04 and RHEL 9."""
    symbols = subprocess.check_output(["objdump", "-T", str(cuda_extension.build())], text=True)
    versions = {tuple(map(int, v.split("."))) for v in re.findall(r"GLIBC_(\d+\.\d+)", symbols)}
    assert (2, 2) < max(versions) <= (2, 34)


def test_without_nvcc_the_message_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(cuda_extension, "find_nvcc", lambda: None)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    with pytest.raises(UnavailableError, match="no nvcc to build them: install .*CUDA_HOME"):
        cuda_extension.build()


def test_a_failed_build_shows_what_the_compiler_said(fake_nvcc):
    fake_nvcc(log="error: no such instruction", code=1)
    with pytest.raises(UnavailableError, match="(?s)cannot build csrc.*no such instruction"):
        cuda_extension.build()
    assert cuda_extension.built() is None


@pytest.mark.parametrize(
    "log", ["8 bytes stack frame, 24 bytes spill stores", "ptxas info (C7508) : setmaxnreg ignored"]
)
def test_a_slow_build_is_refused(fake_nvcc, log):
    fake_nvcc(log=log)
    with pytest.raises(UnavailableError, match="would be slow: .*(24 bytes spill|C7508)"):
        cuda_extension.build()
    assert cuda_extension.built() is None


def test_ranks_that_start_together_build_once(fake_nvcc):
    runs = fake_nvcc()
    with ThreadPoolExecutor(4) as pool:
        paths = {
            future.result() for future in [pool.submit(cuda_extension.build) for _ in range(4)]
        }
    assert len(paths) == 1 and runs.read_text() == "run\n"


@pytest.mark.processes
def test_a_killed_build_leaves_no_lock_and_its_files_go_with_the_next(fake_nvcc):
    runs = fake_nvcc()
    left = cuda_extension.cache_folder() / "building-left"
    left.mkdir(parents=True)
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import time; from dpo_fast.ops.linear_logp import cuda_extension as c\n"
            "with c._lock(c.cache_folder() / 'lock'):\n"
            "    print('held', flush=True); time.sleep(60)",
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout.readline() == "held\n"
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    cuda_extension.build()
    assert runs.read_text() == "run\n" and not left.exists()


def test_no_sources_is_said_by_name(fake_nvcc, monkeypatch, tmp_path):
    """A checkout without symbolic links has a file there, an incomplete installation nothing."""
    fake_nvcc()
    monkeypatch.setattr(cuda_extension, "SOURCES", tmp_path / "csrc")
    assert re.search("sources of csrc are not in .*'triton'", cuda_extension.why_not())
    (tmp_path / "csrc").write_text("../csrc")
    with pytest.raises(UnavailableError, match="sources of csrc are not in .*symbolic links"):
        cuda_extension.build()


@pytest.mark.parametrize("mode", [0o644, 0o755])
def test_an_nvcc_that_does_not_run_is_named(mode, fake_nvcc, tmp_path):
    fake_nvcc()
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.write_bytes(b"not a program")
    nvcc.chmod(mode)
    with pytest.raises(UnavailableError, match="nvcc does not run .*: install .*CUDA_HOME"):
        cuda_extension.build()
    assert "nvcc does not run" in cuda_extension.why_not()


def test_a_cache_that_cannot_be_written_is_named(fake_nvcc, monkeypatch, tmp_path):
    fake_nvcc()
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file"))
    with pytest.raises(UnavailableError, match="csrc in .*file.dpo_fast: .*TORCH_EXTENSIONS_DIR"):
        cuda_extension.build()


def test_machines_of_two_kinds_may_share_a_cache(fake_nvcc, monkeypatch):
    runs = fake_nvcc()
    monkeypatch.setattr(cuda_extension.platform, "machine", lambda: "x86_64")
    first = cuda_extension.build()
    monkeypatch.setattr(cuda_extension.platform, "machine", lambda: "aarch64")
    assert cuda_extension.built() is None and cuda_extension.build() != first
    assert runs.read_text() == "run\nrun\n"


def test_a_named_cache_needs_no_home(monkeypatch, tmp_path):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(cuda_extension.Path, "home", no_home)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert cuda_extension.cache_folder() == tmp_path / "dpo_fast"
