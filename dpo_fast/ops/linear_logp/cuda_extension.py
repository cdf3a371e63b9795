"""csrc as a library: built by nvcc on first use or ahead of it, and found again by a hash.

    python -m dpo_fast.ops.linear_logp.cuda_extension    # make csrc: builds, prints registers

The library's folder is named after the hash of sources, flags and kind of processor, and after nvcc's
version. It lies below torch's folder of extensions or the user's cache. torch's version is not part of the
name: the library uses torch's stable ABI and brings CUDA's runtime along.

It is built aside and renamed. A lock, which the system drops with its process, keeps ranks from building at
the same time.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from dpo_fast import durable
from dpo_fast.errors import UnavailableError

logger = logging.getLogger("dpo_fast")
SOURCES = Path(__file__).resolve().parents[2] / "csrc"
UNITS = ("linear_logp_sm90.cu", "bindings.cpp")
SUFFIXES = (".cu", ".cuh", ".h", ".cpp")
LIBRARY, LOG = "libdpo_fast_sm90.so", "build.log"
# The -arch shorthand may run a plain sm_90 pass as well, which has no wgmma.
TARGET = "-gencode=arch=compute_90a,code=sm_90a"
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # torch 2.10
FLAGS = ("-std=c++17", "-O3", TARGET, STABLE_ABI, "-Xcompiler=-fPIC", "-Xptxas=-v")
REMEDY = (
    "install the CUDA toolkit (12.3 or later) and put nvcc on PATH or set CUDA_HOME, or ask for "
    "implementation='triton'"
)


def find_nvcc() -> Path | None:
    """nvcc of CUDA_HOME or CUDA_PATH, of PATH, or of the usual place."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    named = [Path(home) / "bin" / "nvcc" for home in homes]
    on_path = shutil.which("nvcc")
    candidates = [*named, *([Path(on_path)] if on_path else []), Path("/usr/local/cuda/bin/nvcc")]
    return next((path for path in candidates if path.is_file()), None)


def sources() -> list[Path]:
    """The files that the library is made of.

    Raises:
        UnavailableError: there is no csrc.
    """
    if not SOURCES.is_dir():
        raise UnavailableError(
            f"the sources of csrc are not in {SOURCES}: install dpo_fast again, or check it out with "
            "symbolic links, or ask for implementation='triton'"
        )
    return sorted(path for path in SOURCES.iterdir() if path.suffix in SUFFIXES)


def content_hash() -> str:
    """16 hexadecimal digits, of the sources, their names, the flags and the kind of processor.

    Machines of two kinds may share a home.
    """
    digest = hashlib.sha256(repr((FLAGS, platform.machine())).encode())
    for path in sources():
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)} ".encode() + content)
    return digest.hexdigest()[:16]


def nvcc_version(nvcc: Path) -> str:
    """Such as 13.0.88.

    Raises:
        UnavailableError: nvcc does not run.
    """
    try:
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    except OSError as error:
        raise UnavailableError(f"{nvcc} does not run ({error.strerror}): {REMEDY}") from error
    found = re.search(r"V(\d+\.\d+\.\d+)", text)
    return found.group(1) if found else hashlib.sha256(text.encode()).hexdigest()[:8]


def cache_folder() -> Path:
    """The folder dpo_fast in $TORCH_EXTENSIONS_DIR, else in $XDG_CACHE_HOME, else in ~/.cache."""
    named = os.environ.get("TORCH_EXTENSIONS_DIR") or os.environ.get("XDG_CACHE_HOME")
    return Path(named or Path.home() / ".cache") / "dpo_fast"


def built() -> Path | None:
    """The library of these sources, by this nvcc, or by any if there is no nvcc. None: not built yet."""
    nvcc = find_nvcc()
    pattern = f"csrc-{content_hash()}-nvcc{nvcc_version(nvcc) if nvcc else '*'}/{LIBRARY}"
    found = sorted(cache_folder().glob(pattern), key=lambda path: path.stat().st_mtime)
    return found[-1] if found else None


def why_not() -> str | None:
    """None if the library is there or can be built, else the reason and the remedy."""
    try:
        if built() is not None or find_nvcc() is not None:
            return None
    except UnavailableError as error:
        return str(error)
    return f"the kernels of csrc are not built and there is no nvcc to build them: {REMEDY}"


def command(nvcc: Path, output: Path) -> list[str]:
    """nvcc's command line."""
    torch_folder = Path(torch.__file__).parent
    # libtorch stands for libtorch_cpu and, where there is one, libtorch_cuda.
    link = [f"-L{torch_folder / 'lib'}", "-Xlinker=--no-as-needed", "-ltorch", "-ltorch_cpu"]
    files = [str(SOURCES / unit) for unit in UNITS]
    include = ["-isystem", str(torch_folder / "include")]
    return [str(nvcc), *FLAGS, "-shared", *include, "-o", str(output), *files, *link]


def build() -> Path:
    """The library's path, built if need be.

    Raises:
        UnavailableError: no nvcc, no sources, no room in the cache, nvcc fails, or its code spills
            registers.
    """
    found = built()
    if found is not None:
        return found
    nvcc = find_nvcc()
    if nvcc is None:
        raise UnavailableError(f"cannot build csrc: {why_not()}")
    try:
        with _lock(cache_folder() / "lock"):
            return built() or _compile(nvcc)
    except OSError as error:
        raise UnavailableError(
            f"cannot build csrc in {cache_folder()}: {error}; set TORCH_EXTENSIONS_DIR to a folder that "
            "can be written to, or ask for implementation='triton'"
        ) from error


@contextlib.contextmanager
def _lock(path: Path):
    """The system drops it when the process ends, however it ends; the empty file stays."""
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile(nvcc: Path) -> Path:
    folder = cache_folder() / f"csrc-{content_hash()}-nvcc{nvcc_version(nvcc)}"
    logger.info("building csrc with %s, once, into %s", nvcc, folder)
    for left in folder.parent.glob("building-*"):  # of builds that were killed: the lock is ours
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="building-") as aside:
        made = Path(aside) / folder.name
        made.mkdir()
        run = subprocess.run(command(nvcc, made / LIBRARY), capture_output=True, text=True)
        log = run.stdout + run.stderr
        if run.returncode:
            raise UnavailableError(f"{nvcc} cannot build csrc; {REMEDY}. It says:\n{log[-4000:]}")
        wrong = complaints(log)
        if wrong:
            raise UnavailableError(
                f"csrc built by {nvcc} would be slow: {'; '.join(wrong)}. Use another CUDA toolkit, "
                "or ask for implementation='triton'"
            )
        (made / LOG).write_text(log)
        # An older one has no library, or `built` had found it.
        durable.publish(made, folder, replace=True)
    return folder / LIBRARY


def complaints(log: str) -> list[str]:
    """Spills, and ptxas's warnings C75xx: setmaxnreg ignored, wgmma put one after the other."""
    spills = re.findall(r"([1-9]\d* bytes spill (?:stores|loads))", log)
    return spills + re.findall(r".*\bC75\d\d\b.*", log)


@functools.cache
def operations():
    """torch.ops.dpo_fast_sm90, from the library; builds it if need be."""
    torch.ops.load_library(str(build()))
    return torch.ops.dpo_fast_sm90


def main() -> int:
    try:
        path = build()
    except UnavailableError as error:
        print(error, file=sys.stderr)
        return 2
    log = (path.parent / LOG).read_text()
    print(path)
    for name, registers in re.findall(r"entry function '(\S+)'.*?Used (\d+) registers", log, re.S):
        print(f"{registers:>4} registers at entry, no spills: {_demangled(name)}")
    return 0


def _demangled(name: str) -> str:
    tool = shutil.which("c++filt")
    if tool is None:
        return name
    text = subprocess.run([tool, name], capture_output=True, text=True).stdout.strip()
    return text.split("(")[0].removeprefix("void ") or name


if __name__ == "__main__":
    sys.exit(main())
