"""A weighted sum of losses, normalised over the whole global batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dpo_fast.losses.table import LOSSES, LossOptions, PairLogps


@dataclass(frozen=True)
class Totals:
    """Counts over the global batch: every micro-batch of every rank. They make the loss, and its
    gradient, independent of how the batch was split."""

    pairs: int
    chosen_tokens: int


@dataclass(frozen=True)
class Objective:
    """sum_k weight_k * (sum over pairs of loss_k) / total_k.

    Raises:
        ValueError: an unknown name, or weights that do not fit the names.
    """

    names: tuple[str, ...] = ("sigmoid",)
    weights: tuple[float, ...] = (1.0,)
    options: LossOptions = LossOptions()

    def __post_init__(self) -> None:
        unknown = [name for name in self.names if name not in LOSSES]
        if unknown or not self.names:
            raise ValueError(f"loss {unknown} is not known; choose from {', '.join(LOSSES)}")
        if len(self.weights) != len(self.names):
            raise ValueError(f"{len(self.names)} losses {self.names} have weights {self.weights}")

    @property
    def needs_reference(self) -> bool:
        return any(LOSSES[name].needs_reference for name in self.names)

    def coefficients(self, totals: Totals) -> tuple[float, ...]:
        """What the sum over pairs of each loss is multiplied by: weight_k / total_k."""
        return tuple(
            weight / max(getattr(totals, LOSSES[name].normaliser), 1)
            for name, weight in zip(self.names, self.weights)
        )

    def __call__(self, pairs: PairLogps, totals: Totals) -> Tensor:
        """The share of these pairs in the loss of the global batch; shares add up to the loss."""
        loss = pairs.chosen.new_zeros(())
        for name, coefficient in zip(self.names, self.coefficients(totals)):
            loss = loss + coefficient * LOSSES[name].function(pairs, self.options).sum()
        return loss

    @torch.no_grad()
    def rewards(self, pairs: PairLogps) -> tuple[Tensor, Tensor]:
        """Implicit rewards beta * log-ratio of chosen and rejected, [P] each."""
        beta = self.options.beta
        return beta * pairs.chosen_ratio.detach(), beta * pairs.rejected_ratio.detach()
