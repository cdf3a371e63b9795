"""What this CPU multiplies well: in which dtype, and by which library.

PyTorch hands 16-bit products to oneDNN. With instructions for them they take a half of the fp32 time or
less. Without, they are emulated, and take up to three times as long (35 times in fp16 or on AVX2).
A dtype counts as fast only where its instructions are known to be there and to be used.

PyTorch hands fp32 products to MKL, which gives other makers' CPUs its AVX2 kernels. oneDNN has AVX-512
ones for all of them: 232 against 107 GFLOP/s on a core of an AMD EPYC (Zen 5), 122 with AVX2 alone.

No clock is asked, because results would change with what else runs.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Set
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

logger = logging.getLogger("dpo_fast")
# Features by which oneDNN multiplies a dtype, as the kernel and torch.cpu.get_capabilities name them.
X86 = {torch.bfloat16: ("amx_bf16", "avx512_bf16"), torch.float16: ("amx_fp16", "avx512_fp16")}
ARM = {torch.bfloat16: ("bf16",), torch.float16: ()}  # PyTorch has no fast fp16 product there
LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")  # the first that is set counts
# Values of a limit that exclude instructions, in any case; oneDNN ignores a value that it does not know.
BELOW_AVX2 = ("sse41", "avx")
BELOW_BF16 = (*BELOW_AVX2, "avx2", "avx2_vnni", "avx2_vnni_2", "avx512_core", "avx512_core_vnni")
BELOW = {torch.bfloat16: BELOW_BF16, torch.float16: (*BELOW_BF16, "avx512_core_bf16")}


class Verdict(NamedTuple):
    """Whether something is fast on this CPU, and why, as half a sentence."""

    fast: bool
    reason: str


@functools.cache
def half_products(dtype: torch.dtype) -> Verdict:
    """Whether this CPU multiplies bf16 or fp16 faster than fp32. Logged once."""
    verdict = judge(dtype, cpu_features(), _limit())
    chosen = dtype if verdict.fast else torch.float32
    logger.info("products of %s on the CPU: in %s (%s)", dtype, chosen, verdict.reason)
    return verdict


def judge(dtype: torch.dtype, features: Set[str], limit: str | None) -> Verdict:
    """`half_products` of a CPU with these features.

    limit: "NAME=value" of the environment variable that restricts oneDNN, or None.
    """
    short = "bf16" if dtype == torch.bfloat16 else "fp16"
    if not torch.backends.mkldnn.is_available():
        return Verdict(False, f"this PyTorch is built without oneDNN, which multiplies {short}")
    arm = "asimd" in features or "neon" in features
    wanted = (ARM if arm else X86)[dtype]
    there = [name for name in wanted if name in features]
    if not there:
        names = " or ".join(name.upper() for name in wanted) or f"fast product of {short}"
        return Verdict(False, f"this CPU has no {names}")
    if arm and not torch.backends.mkldnn.is_acl_available():
        return Verdict(False, f"this PyTorch has no Arm Compute Library, which multiplies {short}")
    if limit is not None and limit.partition("=")[2].lower() in BELOW[dtype]:
        return Verdict(False, f"{limit} keeps oneDNN from {there[0].upper()}")
    return Verdict(True, f"this CPU has {there[0].upper()}")


def product_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype of the operands of products on 16-bit tensors: fp32 on a CPU that is slow with theirs."""
    if device.type != "cpu" or dtype.itemsize != 2 or half_products(dtype).fast:
        return dtype
    return torch.float32


@functools.cache
def by_onednn() -> bool:
    """Whether oneDNN multiplies fp32 here faster than `torch.mm` does."""
    limit = (_limit() or "").partition("=")[2].lower()
    return (
        torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and "avx2" in cpu_features()
        and limit not in BELOW_AVX2
        and not _made_by_intel()
    )


def product(a: Tensor, b: Tensor, buffer: Tensor | None = None) -> Tensor:
    """a @ b, [M, K] @ [K, N] of one dtype. The result may lie in `buffer`, of as many elements or more.

    A buffer saves `torch.mm` the page faults of a fresh result. oneDNN brings its own memory: for the
    result, and for a copy of an operand that is not contiguous. So give it a tile at a time.
    """
    ours = a.dtype == torch.float32 and a.device.type == "cpu" and by_onednn()
    if ours and a.numel() and b.numel():
        return torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")
    if buffer is None:
        return a @ b
    out = buffer[: a.shape[0] * b.shape[1]].view(a.shape[0], b.shape[1])
    return torch.mm(a, b, out=out)


def describe(dtype: torch.dtype) -> str:
    """How products on tensors of a dtype are made, and why."""
    library = "oneDNN" if by_onednn() else "torch.mm"
    if dtype.itemsize != 2:
        return f"products by {library}"
    verdict = half_products(dtype)
    if verdict.fast:
        return f"products in {str(dtype).removeprefix('torch.')}: {verdict.reason}"
    return f"products in float32 by {library}: {verdict.reason}"


@functools.cache
def cpu_features() -> frozenset[str]:
    """The features of this CPU in the kernel's names; empty where nobody tells."""
    if words := cpuinfo("flags") or cpuinfo("Features"):
        return frozenset(words.split())
    told = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return frozenset(name for name, has in told.items() if has is True)


def instruction_set() -> str:
    """The vector instructions in use, and what restricts oneDNN: "avx512 avx512_bf16"."""
    has = cpu_features()
    known = [name for names in (*X86.values(), ("bf16", "sve")) for name in names]
    names = [torch.backends.cpu.get_cpu_capability().lower(), *(n for n in known if n in has)]
    return " ".join(filter(None, [*names, _limit()]))


def _made_by_intel() -> bool:
    return cpuinfo("vendor_id") in ("GenuineIntel", "")  # where nobody tells, MKL is left alone


def cpuinfo(key: str) -> str:
    """The first value of a key in /proc/cpuinfo, "" if there is none."""
    file = Path("/proc/cpuinfo")
    for line in file.read_text().splitlines() if file.is_file() else ():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""


def _limit() -> str | None:
    return next((f"{name}={os.environ[name]}" for name in LIMITS if os.environ.get(name)), None)
