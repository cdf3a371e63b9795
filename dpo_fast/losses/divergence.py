"""From log-ratios to scores: which divergence from the reference is penalised (arXiv 2309.16240)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_fast.losses.logps import PairLogps
from dpo_fast.losses.options import LossOptions

LARGEST_EXPONENT = 80.0  # exp of it is finite in fp32


def score(ratio: Tensor, options: LossOptions) -> Tensor:
    """s(r), elementwise: r; 1 - exp(-r); log 2 + LS(r); (exp((A-1) r) - 1) / (A-1), by divergence."""
    if options.f_divergence_type == "forward_kl":
        return 1 - torch.exp((-ratio).clamp(max=LARGEST_EXPONENT))
    if options.f_divergence_type == "js_divergence":
        return math.log(2) + F.logsigmoid(ratio)
    power = options.f_alpha_divergence_coef - 1
    if options.f_divergence_type == "alpha_divergence" and abs(power) >= 1e-6:
        return torch.expm1((power * ratio).clamp(max=LARGEST_EXPONENT)) / power
    return ratio


def margin(pairs: PairLogps, options: LossOptions) -> Tensor:
    """d = s(a) - s(b), [P]."""
    return score(pairs.chosen_ratio, options) - score(pairs.rejected_ratio, options)


def mean_margin(pairs: PairLogps, options: LossOptions) -> Tensor:
    """s(a)/nw - s(b)/nl, [P]."""
    chosen, rejected = score(pairs.chosen_ratio, options), score(pairs.rejected_ratio, options)
    return chosen / pairs.chosen_lengths - rejected / pairs.rejected_lengths


def less_margin(x: Tensor, pairs: PairLogps) -> Tensor:
    """x minus the margin that the data ask for, in units of reward."""
    return x if pairs.margin is None else x - pairs.margin


def smoothed(x: Tensor, eps: float) -> Tensor:
    return -(1 - eps) * F.logsigmoid(x) - eps * F.logsigmoid(-x)
