"""Metrics under the names people plot: one definition for the modules and for the trainer.

Chosen and rejected sequences, by the kind of batch:

    pairs              the first and the second of each
    labels             the desirable and the undesirable ones
    groups             those of the highest score in their group, and those of the lowest

`rewards/accuracies`: how often the chosen one of a pair, or the better one of any two of a group, has the
higher reward. A tie counts as half: policy and reference that are equal have an accuracy of 0.5, not 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dpo_fast.losses import ScoredGroups
from dpo_fast.losses.groups import extremes, order_kept, preferred
from dpo_fast.ops.segments import sum_sequences

TOKEN_METRICS = {"entropy": "entropy", "is_top1": "mean_token_accuracy"}  # extra: its metric
METRIC_EXTRAS = (*TOKEN_METRICS, "mean_logit")  # extras of the head that metrics show


class Metric(NamedTuple):
    """A mean as two parts: the sum of `values`, over `count`. Over several batches each part adds up."""

    values: Tensor
    count: Tensor | int

    def mean(self) -> Tensor:
        """[]; nan if the count is 0."""
        return self.values.sum() / self.count


def means(metrics: dict[str, Metric]) -> dict[str, Tensor]:
    """The mean of each, []."""
    return {name: metric.mean() for name, metric in metrics.items()}


@torch.no_grad()
def sequence_metrics(
    logps_S: Tensor,
    rewards_S: Tensor,
    desirable_S: Tensor | None = None,
    groups: ScoredGroups | None = None,
) -> dict[str, Metric]:
    """Rewards and log-probabilities by side; for pairs margins; for pairs and groups accuracies.

    Without desirable_S and groups the sequences are pairs, chosen and rejected in turn.
    """
    chosen_S, rejected_S = sides(len(logps_S), logps_S.device, desirable_S, groups)
    metrics = {}
    for name, values_S in (("rewards", rewards_S), ("logps", logps_S.detach())):
        metrics[f"{name}/chosen"] = _masked(values_S, chosen_S)
        metrics[f"{name}/rejected"] = _masked(values_S, rejected_S)
    if groups is not None:
        kept = order_kept(rewards_S, groups.scores_S, groups.counts_P)
        metrics["rewards/accuracies"] = Metric(*kept)
    elif desirable_S is None:
        chosen_P, rejected_P = rewards_S.view(-1, 2).unbind(1)
        metrics["rewards/margins"] = Metric(chosen_P - rejected_P, len(chosen_P))
        metrics["rewards/accuracies"] = Metric(preferred(chosen_P, rejected_P), len(chosen_P))
    return metrics


@torch.no_grad()
def token_metrics(
    extras: dict[str, Tensor],
    lengths_S: Tensor,
    desirable_S: Tensor | None = None,
    groups: ScoredGroups | None = None,
) -> dict[str, Metric]:
    """Means of the head's extras, [T] each, over scored tokens; of `mean_logit` by side."""
    found = {name: extras[extra] for extra, name in TOKEN_METRICS.items() if extra in extras}
    metrics = {name: Metric(values_T, values_T.numel()) for name, values_T in found.items()}
    if "mean_logit" in extras:
        logits_S = sum_sequences(extras["mean_logit"], lengths_S)
        masks = sides(len(lengths_S), lengths_S.device, desirable_S, groups)
        for side, mask_S in zip(("chosen", "rejected"), masks):
            tokens = torch.where(mask_S, lengths_S, 0).sum()
            metrics[f"logits/{side}"] = Metric(torch.where(mask_S, logits_S, 0), tokens)
    return metrics


def sides(
    S: int, device: torch.device, desirable_S: Tensor | None, groups: ScoredGroups | None
) -> tuple[Tensor, Tensor]:
    """Which sequences are chosen and which rejected, bool [S] each."""
    if groups is not None:
        return extremes(groups.scores_S, groups.counts_P)
    chosen_S = torch.arange(S, device=device) % 2 == 0 if desirable_S is None else desirable_S
    return chosen_S, ~chosen_S


def _masked(values: Tensor, mask: Tensor) -> Metric:
    return Metric(torch.where(mask, values, 0), mask.sum())
