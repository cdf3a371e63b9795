"""References that need no store: computed with every batch, read from its columns, or none at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor, nn

from dpo_fast.data.batch import ScoredBatch
from dpo_fast.data.kinds import PAIRS, Kind
from dpo_fast.models.adapters import copies_of
from dpo_fast.models.scoring import forward_arguments
from dpo_fast.ops.segments import sum_sequences

Scorer = Callable[..., Mapping[str, Tensor]]  # a scoring model, or an engine round one


class Provider(Protocol):
    """Gives the reference log-probs of a batch. Some also give `token_logps(batch)`, fp32 [T]."""

    def __call__(self, batch: ScoredBatch) -> Tensor | None:
        """Summed log-probs of the sequences, fp32 [S], on the batch's device; None: no reference."""
        ...


@torch.no_grad()
def score_tokens(scorer: Scorer, batch: ScoredBatch) -> Tensor:
    """Log-probability of every scored token, fp32 [T]."""
    return scorer(**forward_arguments(batch))["logp"]


class NoReference:
    """No reference: the losses compare with none."""

    def __call__(self, batch: ScoredBatch) -> None:
        return None

    token_logps = __call__


class ColumnReference:
    """Sums that came with the data. kind: of its examples; it names the columns."""

    def __init__(self, kind: Kind = PAIRS) -> None:
        self.names = kind.reference_columns

    def __call__(self, batch: ScoredBatch) -> Tensor:
        return torch.stack([batch.columns[name] for name in self.names], 1).flatten()


class LiveReference:
    """Sums of the token log-probs that a subclass's `token_logps` computes."""

    def __call__(self, batch: ScoredBatch) -> Tensor:
        return sum_sequences(self.token_logps(batch), batch.lengths_S)


class FrozenReference(LiveReference):
    """A second model that is not trained."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer

    def token_logps(self, batch: ScoredBatch) -> Tensor:
        return score_tokens(self.scorer, batch)


class AdapterOffReference(LiveReference):
    """The policy itself with its adapters off, or as they started: no second copy of the weights."""

    def __init__(self, scorer: Scorer, as_started: Callable[[], AbstractContextManager]) -> None:
        self.scorer = scorer
        self.as_started = as_started

    def token_logps(self, batch: ScoredBatch) -> Tensor:
        with self.as_started():
            return score_tokens(self.scorer, batch)


class EmaReference(FrozenReference):
    """TR-DPO: a second model that follows the policy (arXiv 2404.09656 eq 5).

    Every `sync_steps` steps: reference <- alpha policy + (1 - alpha) reference. alpha=1 copies the policy.

    Each rank mixes what it holds: whole parameters, or DeepSpeed's shards at stage 3. Both models are
    sharded alike, so nothing is gathered. The names of their parameters must agree.
    """

    def __init__(self, scorer: Scorer, policy: nn.Module, alpha: float, sync_steps: int) -> None:
        super().__init__(scorer)
        self.policy, self.alpha, self.sync_steps = policy, alpha, sync_steps

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Update, if one is due. step: the optimiser step that is over, counted from 1."""
        if step % self.sync_steps:
            return
        for _, parameter, followed in self._pairs():
            own = local(parameter)
            own.lerp_(local(followed).to(own), self.alpha)
            _forget_gathered(parameter)

    def state_dict(self) -> dict[str, Tensor]:
        """This rank's part of the reference, on the CPU."""
        return {name: local(own).detach().cpu() for name, own, _ in self._pairs()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state_dict` gave on this rank."""
        for name, parameter, _ in self._pairs():
            local(parameter).copy_(state[name])
            _forget_gathered(parameter)

    def _pairs(self) -> Iterator[tuple[str, nn.Parameter, nn.Parameter]]:
        """Every parameter of the reference: its name, itself, and the policy's that it follows."""
        policy = dict(self.policy.named_parameters())
        model = getattr(self.scorer, "module", self.scorer)
        return ((name, own, policy[name]) for name, own in model.named_parameters())


class EmaAdapterReference(EmaReference):
    """TR-DPO on adapters: a copy of them that follows them, on the weights of the policy itself."""

    def __init__(
        self,
        scorer: Scorer,
        policy: nn.Module,
        alpha: float,
        sync_steps: int,
        as_started: Callable[[], AbstractContextManager],
    ) -> None:
        super().__init__(scorer, policy, alpha, sync_steps)
        self.as_started = as_started

    def token_logps(self, batch: ScoredBatch) -> Tensor:
        with self.as_started():
            return score_tokens(self.scorer, batch)

    def _pairs(self) -> Iterator[tuple[str, nn.Parameter, nn.Parameter]]:
        return copies_of(self.policy)


def local(parameter: nn.Parameter) -> Tensor:
    """This rank's part of a parameter. An unsharded parameter is returned whole."""
    return getattr(parameter, "ds_tensor", parameter.data)


def _forget_gathered(parameter: nn.Parameter) -> None:
    """Drop the copies that DeepSpeed may keep: the whole of a small parameter, and hpZ's for a group.

    It renews the latter where its optimiser takes a step, and a reference has none.
    """
    if not hasattr(parameter, "ds_tensor"):
        return
    if parameter.ds_status.name == "AVAILABLE":
        parameter.partition()
    parameter.ds_secondary_tensor = None
