"""References that are computed with every batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from dpo_fast.data.batch import ScoredBatch
from dpo_fast.models.scoring import forward_arguments
from dpo_fast.ops.preference import sum_sequences

Scorer = Callable[..., Mapping[str, Tensor]]


@torch.no_grad()
def score(scorer: Scorer, batch: ScoredBatch) -> Tensor:
    """Sequence log-probabilities of a batch, fp32 [S], from a scoring model or an engine round one."""
    return sum_sequences(scorer(**forward_arguments(batch))["logp"], batch.lengths_S)


class NoReference:
    """Nothing to compare with."""

    def __call__(self, batch: ScoredBatch) -> None:
        return None


class FrozenReference:
    """A second model that is not trained."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer

    def __call__(self, batch: ScoredBatch) -> Tensor:
        return score(self.scorer, batch)


class AdapterOffReference:
    """The policy itself with its adapters off: no second copy of the weights."""

    def __init__(self, scorer: Scorer, adapter_off: Callable[[], AbstractContextManager]) -> None:
        self.scorer = scorer
        self.adapter_off = adapter_off

    def __call__(self, batch: ScoredBatch) -> Tensor:
        with self.adapter_off():
            return score(self.scorer, batch)
