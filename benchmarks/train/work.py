"""What a step has to do, counted from the lengths of its pairs: the numerator of MFU. And its
denominator, the fastest matrix product that this machine showed."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.machine import DTYPES
from benchmarks.train.model import Sizes

PRODUCT = {"cpu": 1024, "cuda": 8192}  # rows and columns of the square product
REPEATS = {"cpu": 12, "cuda": 30}


@dataclass(frozen=True)
class Work:
    """Counts of one step over its global batch.

    tokens: of the data, every sequence whole, so a prompt counts twice; scored: answer tokens; once:
    tokens with every prompt counted once. flops: forward and backward over `tokens` (each weight of a
    layer 6 times, causal attention by the squares of the lengths) and the head over `scored`;
    flops_once: the same with every prompt once. No reference, no recomputation, no padding in either.
    """

    pairs: int
    tokens: int
    scored: int
    once: int
    flops: float
    flops_once: float


def work_of(lengths: np.ndarray, sizes: Sizes) -> Work:
    """lengths: [pairs, 3] tokens of prompt, chosen and rejected."""
    P, C, R = lengths.T.astype(np.float64)
    tokens, scored, once = (2 * P + C + R).sum(), (C + R).sum(), (P + C + R).sum()
    # Token j attends to j tokens: half of a square; an answer also to all of its prompt.
    whole = (((P + C) ** 2 + (P + R) ** 2) / 2).sum()
    prompt_once = (P**2 / 2 + P * (C + R) + (C**2 + R**2) / 2).sum()
    head = sizes.head * scored

    def flops(tokens: float, attended: float) -> float:
        return 6 * (sizes.layers * tokens + head + 2 * sizes.attention * attended)

    return Work(
        len(lengths),
        int(tokens),
        int(scored),
        int(once),
        flops(tokens, whole),
        flops(once, prompt_once),
    )


def matmul_flops(device: str, dtype: str) -> float:
    """Flops a second of the fastest of several square products in the dtype."""
    size = PRODUCT[device]
    a, b = (torch.randn(size, size, device=device, dtype=DTYPES[dtype]) for _ in range(2))
    best = float("inf")
    for _ in range(REPEATS[device]):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
