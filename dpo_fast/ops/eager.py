"""The definition of each operation in plain PyTorch, with the same signature. Tests compare with these."""

from __future__ import annotations

import torch
from torch import Tensor


def head_logits(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """z = cap(logit_scale * (h W^T + b)) / temperature with cap(y) = softcap * tanh(y / softcap).

    Returns [T, V] in fp64 for fp64 inputs and fp32 otherwise, from products in that precision.
    """
    precision = torch.float64 if hidden_TD.dtype == torch.float64 else torch.float32
    logits_TV = hidden_TD.to(precision) @ weight_VD.to(precision).t()
    if bias is not None:
        logits_TV = logits_TV + bias.to(precision)
    return head_options(logits_TV, logit_scale, softcap, temperature)


def head_options(
    raw: Tensor, logit_scale: float = 1.0, softcap: float | None = None, temperature: float = 1.0
) -> Tensor:
    """cap(logit_scale * raw) / temperature, element by element."""
    logits = raw * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits / temperature


def logits_logp(logits_TV: Tensor, targets_T: Tensor, *, temperature: float = 1.0) -> Tensor:
    """logp_t = z_t,y_t - logsumexp_v z_tv with z = logits / temperature, in fp32 (fp64 for fp64)."""
    if logits_TV.dtype != torch.float64:
        logits_TV = logits_TV.float()
    logp_TV = torch.log_softmax(logits_TV / temperature, dim=-1)
    return logp_TV.gather(-1, targets_T.unsqueeze(-1)).squeeze(-1)


def linear_logp(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    extras: tuple[str, ...] = (),
) -> dict[str, Tensor]:
    """`logits_logp` of `head_logits`, and the extras by their definitions (p = softmax z):

    entropy = -sum p log p; log_sum_p2 = log sum p^2; mean_logit = mean_v z; is_top1: z_y >= max z.
    """
    logits_TV = head_logits(hidden_TD, weight_VD, bias, logit_scale, softcap, temperature)
    result = {"logp": logits_logp(logits_TV, targets_T)}
    logp_TV = torch.log_softmax(logits_TV.detach(), dim=-1)
    target_T = logits_TV.detach().gather(-1, targets_T.unsqueeze(-1)).squeeze(-1)
    definitions = {
        "entropy": lambda: -torch.special.xlogy(logp_TV.exp(), logp_TV.exp()).sum(-1),
        "log_sum_p2": lambda: torch.logsumexp(2 * logp_TV, dim=-1),
        "mean_logit": lambda: logits_TV.detach().mean(-1),
        "is_top1": lambda: target_T >= logits_TV.detach().amax(-1),
    }
    return result | {name: definitions[name]() for name in extras}
