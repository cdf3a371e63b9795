"""Who takes part in `bench train`, and what all of them are given.

What a step has to do, counted from the lengths of its pairs: the numerator of MFU. And its
denominator, the fastest matrix product that this machine showed.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from benchmarks.machine import DTYPES
from benchmarks.train.measure import Spans
from benchmarks.train.model import Sizes

LAYOUTS = ("padded", "packed", "shared_prefix")
WARM_UP = (
    2  # steps before the rounds: the first allocates and compiles, the second tells the memory
)


@dataclass(frozen=True)
class Contender:
    """One way to take a training step.

    layout: ours, or "" for TRL's, which is padded. stored: the reference's log-probs come from a table
    made before training; else a frozen model is asked in every step. checkpointing: activations are
    recomputed in backward. options: further arguments of TRL's configuration.
    """

    name: str
    layout: str = ""
    stored: bool = False
    checkpointing: bool = False
    options: dict = field(default_factory=dict)

    @property
    def ours(self) -> bool:
        return bool(self.layout)


OURS = tuple(
    Contender(f"dpo_fast {layout}, {provider}", layout, stored=provider == "cached")
    for provider in ("cached", "frozen")
    for layout in LAYOUTS
)
TRL = (
    Contender("trl", checkpointing=True),
    Contender("trl, no checkpointing"),
    Contender("trl, precomputed", stored=True, checkpointing=True),
    Contender("trl, precomputed, no checkpointing", stored=True),
    Contender("trl, padding_free", checkpointing=True, options={"padding_free": True}),
)
CONTENDERS = {contender.name: contender for contender in (*TRL, *OURS)}


@dataclass(frozen=True)
class Task:
    """The same for every contender: model, pairs, order of the pairs, optimiser.

    order: rows of the data of every step. works: counts of every step. padded_pairs, packed_pairs: of one
    forward, TRL's and ours padded; ours without padding.
    """

    model: Path
    data: Path
    rows: list[dict]
    order: list[list[int]]
    works: list[Work]
    folder: Path
    spans: Spans
    device: str
    dtype: str
    padded_pairs: int
    packed_pairs: int
    max_length: int
    zero_stage: int
    learning_rate: float
    seed: int = 42
    max_grad_norm: float = 1.0

    @property
    def steps(self) -> int:
        return len(self.order)

    @property
    def global_batch_size(self) -> int:
        return len(self.order[0])

    def micro_batch_size(self, layout: str) -> int:
        return self.padded_pairs if layout in ("", "padded") else self.packed_pairs


def lengths_of(rows: list[dict]) -> np.ndarray:
    """[pairs, 3] tokens of prompt, chosen and rejected."""
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return np.array([[len(row[name]) for name in names] for row in rows], dtype=np.int64)


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
