"""Log-ratios shaped by the divergence from the reference that is penalised (arXiv 2309.16240)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from dpo_fast.losses.logps import PairLogps
from dpo_fast.losses.options import LossOptions

if TYPE_CHECKING:
    from torch import Tensor

LARGEST_EXPONENT = 80.0  # exp of it is finite in fp32


def log_sigmoid(x: Tensor) -> Tensor:
    """LS(x)."""
    return torch.nn.functional.logsigmoid(x)


def shaped(ratio: Tensor, options: LossOptions) -> Tensor:
    """s(r), elementwise, by `f_divergence_type`.

    reverse_kl: r.
    forward_kl: 1 - exp(-r).
    js_divergence: log 2 + LS(r).
    alpha_divergence: (exp((A-1) r) - 1) / (A-1), A = f_alpha_divergence_coef; r near A = 1.
    """
    if options.f_divergence_type == "forward_kl":
        return 1 - torch.exp((-ratio).clamp(max=LARGEST_EXPONENT))
    if options.f_divergence_type == "js_divergence":
        return math.log(2) + log_sigmoid(ratio)
    power = options.f_alpha_divergence_coef - 1
    if options.f_divergence_type == "alpha_divergence" and abs(power) >= 1e-6:
        return torch.expm1((power * ratio).clamp(max=LARGEST_EXPONENT)) / power
    return ratio


def margin(pairs: PairLogps, options: LossOptions) -> Tensor:
    """d = s(a) - s(b), [P]."""
    return shaped(pairs.chosen_ratio, options) - shaped(pairs.rejected_ratio, options)


def mean_margin(pairs: PairLogps, options: LossOptions) -> Tensor:
    """s(a)/nw - s(b)/nl, [P]."""
    chosen, rejected = shaped(pairs.chosen_ratio, options), shaped(pairs.rejected_ratio, options)
    return chosen / pairs.chosen_lengths - rejected / pairs.rejected_lengths


def less_margin(x: Tensor, pairs: PairLogps) -> Tensor:
    """x less the column `margin`, in units of reward."""
    return x if pairs.margin is None else x - pairs.margin


def smoothed(x: Tensor, eps: float) -> Tensor:
    """-(1-eps) LS(x) - eps LS(-x)."""
    return -(1 - eps) * log_sigmoid(x) - eps * log_sigmoid(-x)
