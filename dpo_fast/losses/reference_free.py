"""Losses on pairs without a reference. Letters as in `pairwise`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from dpo_fast.losses.divergence import less_margin, log_sigmoid, smoothed
from dpo_fast.losses.logps import PairLogps, SequenceLogps
from dpo_fast.losses.options import LossOptions
from dpo_fast.losses.pairwise import MARGIN
from dpo_fast.losses.spec import WEIGHTING, loss

if TYPE_CHECKING:
    from torch import Tensor


@loss(
    "-lw, divided by the chosen tokens of the global batch",
    "RPO, arXiv 2404.19733; MPO, arXiv 2411.10442",
    "SFT; beside another loss, to keep the chosen log-probs from falling",
    WEIGHTING,
    single=True,
    needs_reference=False,
    normaliser="chosen_tokens",
    kernel=True,
)
def sft(answers: PairLogps | SequenceLogps, options: LossOptions) -> Tensor:
    return -answers.likelihood


@loss(
    "-(1-eps) LS(x) - eps LS(-x), x = beta (lw/nw - ll/nl) - gamma - m",
    "SimPO, arXiv 2405.14734",
    "no memory or time for a reference; beta 2 to 10, gamma about half of it",
    ("beta", "label_smoothing", "simpo_gamma", *WEIGHTING),
    columns=MARGIN,
    needs_reference=False,
    divides=lambda options: True,
)
def simpo(pairs: PairLogps, options: LossOptions) -> Tensor:
    gap = pairs.chosen / pairs.chosen_lengths - pairs.rejected / pairs.rejected_lengths
    x = less_margin(options.beta * gap - options.simpo_gamma, pairs)
    return smoothed(x, options.label_smoothing)


@loss(
    "-(1-eps) LS(x) - eps LS(-x) + alpha sft, x = beta (lw - ll) - m",
    "CPO, arXiv 2401.08417",
    "as simpo, with sums and an sft term",
    ("beta", "label_smoothing", "cpo_alpha", "ld_alpha", *WEIGHTING),
    columns=MARGIN,
    needs_reference=False,
    sft=lambda options: options.cpo_alpha,
)
def cpo(pairs: PairLogps, options: LossOptions) -> Tensor:
    x = less_margin(options.beta * (pairs.chosen - pairs.rejected), pairs)
    return smoothed(x, options.label_smoothing)


def log_odds(pairs: PairLogps, options: LossOptions) -> dict[str, Tensor]:
    """Log of the ratio of odds, chosen over rejected, of the mean token's probability, [P]."""
    p, q = pairs.chosen / pairs.chosen_lengths, pairs.rejected / pairs.rejected_lengths
    return {"log_odds": (p - q) - (log1mexp(p) - log1mexp(q))}


@loss(
    "sft - beta LS(p - q - (log(1 - e^p) - log(1 - e^q))), p = lw/nw, q = ll/nl",
    "ORPO, arXiv 2403.07691",
    "SFT and preference in one stage, from a base model",
    ("beta", *WEIGHTING),
    needs_reference=False,
    sft=lambda options: 1.0,
    watch=log_odds,
    divides=lambda options: True,
)
def orpo(pairs: PairLogps, options: LossOptions) -> Tensor:
    return -options.beta * log_sigmoid(log_odds(pairs, options)["log_odds"])


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x <= 0, exact on both sides of -ln 2 (Maechler 2012).

    x = 0, a certain token, is taken as the next smaller number.
    """
    x = x.clamp(max=-torch.finfo(x.dtype).tiny)
    near = x > -math.log(2)
    # Each branch sees values in its range: else the branch not used would make the gradient nan.
    small = torch.where(near, x, -1.0)
    large = torch.where(near, -1.0, x)
    return torch.where(near, torch.log(-torch.expm1(small)), torch.log1p(-torch.exp(large)))


@loss(
    "relu(delta - (lw - ll) + m) + lambda sft",
    "SLiC-HF, arXiv 2305.10425",
    "a hinge on log-probs themselves, with an sft term",
    ("slic_delta", "slic_lambda", "ld_alpha", *WEIGHTING),
    columns=MARGIN,
    needs_reference=False,
    sft=lambda options: options.slic_lambda,
)
def slic(pairs: PairLogps, options: LossOptions) -> Tensor:
    return torch.relu(options.slic_delta - less_margin(pairs.chosen - pairs.rejected, pairs))
