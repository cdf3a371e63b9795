"""References that are computed with every batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from dpo_fast.data.batch import ScoredBatch
from dpo_fast.data.kinds import PAIRS, Kind
from dpo_fast.models.scoring import forward_arguments
from dpo_fast.ops.preference import sum_sequences

Scorer = Callable[..., Mapping[str, Tensor]]


@torch.no_grad()
def score_tokens(scorer: Scorer, batch: ScoredBatch) -> Tensor:
    """Log-probability of every scored token, fp32 [T], from a scoring model or an engine round one."""
    return scorer(**forward_arguments(batch))["logp"]


class NoReference:
    """Nothing to compare with."""

    def __call__(self, batch: ScoredBatch) -> None:
        return None

    token_logps = __call__


class ColumnReference:
    """Sums that came with the data, in the columns of its kind."""

    def __init__(self, kind: Kind = PAIRS) -> None:
        self.names = kind.reference_columns

    def __call__(self, batch: ScoredBatch) -> Tensor:
        return torch.stack([batch.columns[name] for name in self.names], 1).flatten()


class LiveReference:
    """Sums, fp32 [S], of what `token_logps` gives, fp32 [T]."""

    def __call__(self, batch: ScoredBatch) -> Tensor:
        return sum_sequences(self.token_logps(batch), batch.lengths_S)


class FrozenReference(LiveReference):
    """A second model that is not trained."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer

    def token_logps(self, batch: ScoredBatch) -> Tensor:
        return score_tokens(self.scorer, batch)


class AdapterOffReference(LiveReference):
    """The policy itself with its adapters off: no second copy of the weights."""

    def __init__(self, scorer: Scorer, adapter_off: Callable[[], AbstractContextManager]) -> None:
        self.scorer = scorer
        self.adapter_off = adapter_off

    def token_logps(self, batch: ScoredBatch) -> Tensor:
        with self.adapter_off():
            return score_tokens(self.scorer, batch)
