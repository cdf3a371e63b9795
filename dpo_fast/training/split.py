"""One set of pairs of a run, and how its batches are made."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from dpo_fast.data.batch import ScoredBatch
from dpo_fast.data.dataset import PairDataset, load_pairs
from dpo_fast.data.layouts import collate
from dpo_fast.data.sampler import Sampler
from dpo_fast.errors import UserError
from dpo_fast.losses import Totals
from dpo_fast.training import distributed
from dpo_fast.training.config import RunConfig


@dataclass
class Split:
    """One set of pairs, and how its batches are made."""

    name: str
    pairs: PairDataset
    sampler: Sampler
    layout: str
    pad_id: int

    @functools.cached_property
    def lengths(self) -> dict[str, np.ndarray]:
        """Tokens of every prompt, chosen and rejected answer."""
        return self.pairs.lengths

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        answers = np.maximum(self.lengths["chosen"], self.lengths["rejected"])
        return int((self.lengths["prompt"] + answers).max())

    def totals(self, rows: list[int]) -> Totals:
        """Counts of a global batch. Every rank knows them from the data: nothing is communicated."""
        return Totals(len(rows), int(self.lengths["chosen"][rows].sum()))

    def batches(self, step: int) -> Iterator[ScoredBatch]:
        """This rank's micro-batches of a step, tokens on the CPU."""
        for rows in self.sampler.micro_batches(step, distributed.rank()):
            pairs = [self.pairs[row] for row in rows]
            yield collate(pairs, self.layout, pad_id=self.pad_id, indices=rows)

    def all_batches(self) -> Iterator[ScoredBatch]:
        """This rank's share of one pass, the same number of batches on every rank."""
        for step in range(self.sampler.steps_per_epoch):
            yield from self.batches(step)


def load_split(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, name: str, shuffle: bool
) -> Split:
    """Read, check and tokenise a split (`train` or `eval`), or find it done."""
    pairs = distributed.main_first(
        f"data/{name}", lambda: load_pairs(config.data, tokenizer, split=name)
    )
    refuse_columns(pairs)
    world = distributed.world_size()
    size = config.train.global_pairs if shuffle else config.train.micro_pairs * world
    sampler = Sampler(len(pairs), size, config.train.micro_pairs, world, config.train.seed, shuffle)
    return Split(name, pairs, sampler, config.train.layout, tokenizer.pad_token_id)


def refuse_columns(pairs: PairDataset) -> None:
    """Per-pair columns would change the loss; a loss that does not use them must not ignore them."""
    if pairs.extras:
        raise UserError(
            f"the data has the columns {', '.join(pairs.extras)}, which no loss here uses yet; rename "
            "or remove them in the data, or map them away with data.columns"
        )
