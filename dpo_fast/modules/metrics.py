"""Metrics of one batch under the names people plot, as tensors that wait for nothing."""

from __future__ import annotations

import torch
from torch import Tensor

METRIC_EXTRAS = ("entropy", "mean_logit", "is_top1")
TOKEN_METRICS = {"entropy": "entropy", "is_top1": "mean_token_accuracy"}


@torch.no_grad()
def sequence_metrics(
    logps_S: Tensor, rewards_S: Tensor, good_S: Tensor | None = None
) -> dict[str, Tensor]:
    """Means of log-probabilities and rewards over chosen and over rejected sequences, [] each.

    Without good_S the sequences are pairs, chosen and rejected in turn, and have margins and
    accuracies as well; a tie counts as half. A mean over no sequence is nan.
    """
    chosen_S = alternating(len(logps_S), logps_S.device) if good_S is None else good_S
    metrics = {}
    for name, values_S in (("rewards", rewards_S), ("logps", logps_S.detach())):
        for side, mask_S in (("chosen", chosen_S), ("rejected", ~chosen_S)):
            metrics[f"{name}/{side}"] = masked_mean(values_S, mask_S)
    if good_S is None:
        margin_P = rewards_S[0::2] - rewards_S[1::2]
        metrics["rewards/margins"] = margin_P.mean()
        metrics["rewards/accuracies"] = (margin_P.sign() / 2 + 0.5).mean()
    return metrics


@torch.no_grad()
def token_metrics(
    extras: dict[str, Tensor], lengths_S: Tensor, good_S: Tensor | None = None
) -> dict[str, Tensor]:
    """Means over scored tokens of what the head was asked for; of logits by side."""
    metrics = {
        name: extras[extra].float().mean()
        for extra, name in TOKEN_METRICS.items()
        if extra in extras
    }
    if "mean_logit" in extras:
        chosen_S = alternating(len(lengths_S), lengths_S.device) if good_S is None else good_S
        chosen_T = chosen_S.repeat_interleave(lengths_S)
        metrics["logits/chosen"] = masked_mean(extras["mean_logit"], chosen_T)
        metrics["logits/rejected"] = masked_mean(extras["mean_logit"], ~chosen_T)
    return metrics


def alternating(S: int, device: torch.device) -> Tensor:
    return torch.arange(S, device=device) % 2 == 0


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, values, 0).sum() / mask.sum()
