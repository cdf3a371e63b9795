"""Metrics of one batch under the names people plot, as tensors that wait for nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from dpo_fast.losses import ScoredGroups
from dpo_fast.losses.groups import extremes, order_kept

METRIC_EXTRAS = ("entropy", "mean_logit", "is_top1")
TOKEN_METRICS = {"entropy": "entropy", "is_top1": "mean_token_accuracy"}


@torch.no_grad()
def sequence_metrics(
    logps_S: Tensor,
    rewards_S: Tensor,
    desirable_S: Tensor | None = None,
    groups: ScoredGroups | None = None,
) -> dict[str, Tensor]:
    """Means of log-probabilities and rewards over chosen and over rejected sequences, [] each.

    Without desirable_S and groups the sequences are pairs, chosen and rejected in turn, and have margins and
    accuracies as well; a tie counts as half. Of groups those of the highest score are chosen and those of
    the lowest rejected, and accuracies are of any two of unequal scores. A mean over none is nan.
    """
    metrics = {}
    for name, values_S in (("rewards", rewards_S), ("logps", logps_S.detach())):
        for side, mask_S in sides(len(logps_S), logps_S.device, desirable_S, groups).items():
            metrics[f"{name}/{side}"] = masked_mean(values_S, mask_S)
    if groups is not None:
        kept, count = order_kept(rewards_S, groups.scores_S, groups.counts_G)
        metrics["rewards/accuracies"] = kept / count
    elif desirable_S is None:
        margin_P = rewards_S[0::2] - rewards_S[1::2]
        metrics["rewards/margins"] = margin_P.mean()
        metrics["rewards/accuracies"] = (margin_P.sign() / 2 + 0.5).mean()
    return metrics


@torch.no_grad()
def token_metrics(
    extras: dict[str, Tensor],
    lengths_S: Tensor,
    desirable_S: Tensor | None = None,
    groups: ScoredGroups | None = None,
) -> dict[str, Tensor]:
    """Means over scored tokens of what the head was asked for; of logits by side."""
    metrics = {
        name: extras[extra].float().mean()
        for extra, name in TOKEN_METRICS.items()
        if extra in extras
    }
    if "mean_logit" in extras:
        for side, mask_S in sides(len(lengths_S), lengths_S.device, desirable_S, groups).items():
            mask_T = mask_S.repeat_interleave(lengths_S)
            metrics[f"logits/{side}"] = masked_mean(extras["mean_logit"], mask_T)
    return metrics


def sides(
    S: int, device: torch.device, desirable_S: Tensor | None, groups: ScoredGroups | None
) -> dict[str, Tensor]:
    """Which sequences are chosen and which rejected, bool [S] each."""
    if groups is not None:
        return dict(zip(("chosen", "rejected"), extremes(groups.scores_S, groups.counts_G)))
    chosen_S = torch.arange(S, device=device) % 2 == 0 if desirable_S is None else desirable_S
    return {"chosen": chosen_S, "rejected": ~chosen_S}


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, values, 0).sum() / mask.sum()
