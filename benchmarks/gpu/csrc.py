"""csrc: built, then every schedule against fp64, in a process of its own."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch

from benchmarks.gpu import smoke
from benchmarks.gpu.shapes import device
from dpo_fast.ops.dispatch import why_not_cuda
from dpo_fast.ops.linear_logp import cuda_extension


def items(rehearse: bool) -> dict:
    checks = smoke.heads("cuda", rehearse, least_v=50_000 * (not rehearse))
    small_first = sorted(checks, key=lambda name: "T1 " not in name)
    return {"build": build} | {n: functools.partial(if_built, checks[n]) for n in small_first}


def build() -> dict:
    if reason := why_not_cuda("linear_logp", torch.device(device()), torch.bfloat16):
        return {"skipped": reason}
    start = time.perf_counter()
    path = cuda_extension.build()
    log = (path.parent / cuda_extension.LOG).read_text()
    return {"build_seconds": time.perf_counter() - start, "log": log[-3000:]}


def if_built(check: Callable[[], dict]) -> dict:
    reason = why_not_cuda("linear_logp", torch.device(device()), torch.bfloat16)
    if reason is None and cuda_extension.built() is None:
        reason = "it is not built"
    return {"skipped": reason} if reason else check()
