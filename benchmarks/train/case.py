"""Who takes part in `bench train`, and what all of them are given."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.train.spans import Spans
from benchmarks.train.work import Work

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
