"""The kernels of csrc on a CPU: the real sources, compiled with csrc/emulator in place of the hardware."""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
import shutil
import subprocess
import tempfile
from pathlib import Path

from torch import Tensor

from dpo_fast.ops.linear_logp.cuda_extension import SOURCES

POINTER, LONG, INT, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float


class _Operands(ctypes.Structure):
    _fields_ = [
        ("hidden", POINTER),
        ("weight", POINTER),
        ("targets", POINTER),
        ("hidden_stride", LONG),
        ("weight_stride", LONG),
        ("tokens", INT),
        ("vocab", INT),
        ("depth", INT),
        ("scale", FLOAT),
        ("negative", INT),
    ]


class _RowSums(ctypes.Structure):
    _fields_ = [
        ("offset", POINTER),
        ("kept", POINTER),
        ("kept_stride", LONG),
        ("repair", POINTER),
        ("partials", POINTER),
        ("score", POINTER),
        ("shift", POINTER),
        ("maximum", POINTER),
        ("total", POINTER),
        ("weighted", POINTER),
        ("squares", POINTER),
    ]


class _GradientTile(ctypes.Structure):
    _fields_ = [
        ("offset", POINTER),
        ("hit", POINTER),
        ("per_p", POINTER),
        ("first_column", LONG),
        ("out", POINTER),
        ("out_stride", LONG),
    ]


class _Launch(ctypes.Structure):
    _fields_ = [("cluster", INT), ("blocks", INT), ("device", INT), ("stream", POINTER)]


def why_not() -> str | None:
    return None if shutil.which("g++") else "needs g++ to build the emulation"


def build(folder: Path, changes: tuple[tuple[str, str, str], ...] = ()) -> Path:
    """A library of the sources, each of `changes` (file, text, other text) made to a copy of them."""
    copy = folder / "csrc"
    shutil.copytree(SOURCES, copy)
    for name, text, other in changes:
        source = (copy / name).read_text()
        assert source.count(text) == 1, f"{name} has {source.count(text)} times {text!r}"
        (copy / name).write_text(source.replace(text, other))
    library = folder / "emulated.so"
    subprocess.run(
        [
            "g++",
            "-std=c++17",
            "-O2",
            "-Wno-unknown-pragmas",
            "-shared",
            "-fPIC",
            "-Iemulator",
            "-include",
            "emulator/sm90.h",
            "-x",
            "c++",
            "linear_logp_sm90.cu",
            "emulator/calls.cpp",
            "-o",
            str(library),
        ],
        cwd=copy,
        check=True,
        timeout=120,
    )
    return library


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _strided(x: Tensor) -> int:
    return x.stride(0) if len(x) > 1 else -(-x.shape[1] // 8) * 8


class Emulated:
    """What torch.ops.dpo_fast_sm90 offers. Every launch has another order of events.

    Raises:
        RuntimeError: a deadlock, shared memory used too early or too late, a refused tensor map.
    """

    def __init__(self, library: Path, seed: int = 0):
        self.library = ctypes.CDLL(str(library))
        self.library.emulated_rows.restype = ctypes.c_char_p
        self.library.emulated_gradient.restype = ctypes.c_char_p
        self.seeds = itertools.count(seed)
        self.launches: list[tuple[str, int, int]] = []

    def rows(
        self,
        hidden,
        weight,
        targets,
        factor,
        *,
        offset,
        kept,
        repair,
        partials,
        score,
        shift,
        maximum,
        total,
        weighted,
        squares,
        cluster,
        blocks,
    ):
        stride = 0 if kept is None else _strided(kept)
        pointers = map(_pointer, (partials, score, shift, maximum, total, weighted, squares))
        what = _RowSums(_pointer(offset), _pointer(kept), stride, _pointer(repair), *pointers)
        self._call("emulated_rows", hidden, weight, targets, factor, what, cluster, blocks)

    def gradient(
        self,
        hidden,
        weight,
        targets,
        factor,
        offset,
        hit,
        per_p,
        first_column,
        out,
        cluster,
        blocks,
    ):
        what = _GradientTile(
            *map(_pointer, (offset, hit, per_p)), first_column, _pointer(out), _strided(out)
        )
        self._call("emulated_gradient", hidden, weight, targets, factor, what, cluster, blocks)

    def _call(self, name, hidden, weight, targets, factor, what, cluster, blocks):
        operands = _Operands(
            *map(_pointer, (hidden, weight, targets)),
            _strided(hidden),
            _strided(weight),
            len(hidden),
            len(weight),
            hidden.shape[1],
            abs(factor) / math.log(2),
            factor < 0,
        )
        self.launches.append((name, cluster, blocks))
        launch = _Launch(cluster, blocks, 0, None)
        references = map(ctypes.byref, (operands, what, launch))
        wrong = getattr(self.library, name)(*references, next(self.seeds))
        if wrong is not None:
            raise RuntimeError(wrong.decode())


@functools.cache
def emulated() -> Emulated:
    folder = tempfile.TemporaryDirectory(prefix="emulated-sm90-")
    operations = Emulated(build(Path(folder.name)))
    operations.folder = folder  # removed with it
    return operations
