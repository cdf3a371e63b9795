"""References that are computed with every batch.

TR-DPO: a reference that follows the policy (arXiv 2404.09656 eq 5).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from dpo_fast.data.batch import ScoredBatch
from dpo_fast.data.kinds import PAIRS, Kind
from dpo_fast.models.scoring import forward_arguments
from dpo_fast.ops.segments import sum_sequences

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


class EmaReference(FrozenReference):
    """Every `sync_steps` steps reference <- alpha policy + (1 - alpha) reference; alpha 1 copies it.

    It works on what each rank holds: whole parameters, or DeepSpeed's shards at stage 3, which are cut
    alike in both models, so nothing is gathered. Names of parameters must agree.
    """

    def __init__(self, scorer: Scorer, policy: nn.Module, alpha: float, sync_steps: int) -> None:
        super().__init__(scorer)
        self.policy, self.alpha, self.sync_steps = policy, alpha, sync_steps

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """To be called after optimiser step `step`, counted from 1."""
        if step % self.sync_steps:
            return
        policy = dict(self.policy.named_parameters())
        for name, parameter in self._model.named_parameters():
            own = local(parameter)
            own.lerp_(local(policy[name]).to(own), self.alpha)
            _forget_gathered(parameter)

    def state_dict(self) -> dict[str, Tensor]:
        """What this rank holds of the reference."""
        return {name: local(p).detach().cpu() for name, p in self._model.named_parameters()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, parameter in self._model.named_parameters():
            local(parameter).copy_(state[name])
            _forget_gathered(parameter)

    @property
    def _model(self) -> nn.Module:
        return getattr(self.scorer, "module", self.scorer)


def local(parameter: nn.Parameter) -> Tensor:
    """This rank's part of a parameter; the whole of it where it is not sharded."""
    return getattr(parameter, "ds_tensor", parameter.data)


def _forget_gathered(parameter: nn.Parameter) -> None:
    """DeepSpeed may have kept the whole of a small parameter from the last forward."""
    if hasattr(parameter, "ds_tensor") and parameter.ds_status.name == "AVAILABLE":
        parameter.partition()
