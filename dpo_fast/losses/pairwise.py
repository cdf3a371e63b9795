"""Losses on pairs with a reference.

lw, ll    summed log-probs of the chosen and the rejected completion; rw, rl: the reference's
nw, nl    their scored tokens
a, b      log-ratios: lw - rw, ll - rl
d         margin of the shaped log-ratios: s(a) - s(b)
m         the column `margin`, 0 without it
S, LS     sigmoid, its logarithm
eps       label smoothing
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from dpo_fast.losses.divergence import less_margin, log_sigmoid, margin, mean_margin, smoothed
from dpo_fast.losses.logps import PairLogps
from dpo_fast.losses.options import LossOptions
from dpo_fast.losses.spec import DIVERGENCE, SUM_OPTIONS, WEIGHTING, loss

if TYPE_CHECKING:
    from torch import Tensor

COMMON = ("beta", *SUM_OPTIONS, *WEIGHTING)
SCORED = (*COMMON, *DIVERGENCE)
MARGIN = ("weight", "margin")


@loss(
    "-(1-eps) LS(x) - eps LS(-x), x = beta d - m",
    "DPO, arXiv 2305.18290 eq 7; with eps > 0 cDPO",
    "the default; with label_smoothing where some labels are wrong",
    (*SCORED, "label_smoothing"),
    columns=MARGIN,
    kernel=True,
)
def sigmoid(pairs: PairLogps, options: LossOptions) -> Tensor:
    x = less_margin(options.beta * margin(pairs, options), pairs)
    return smoothed(x, options.label_smoothing)


@loss(
    "(s(a)/nw - s(b)/nl - 1/(2 beta))^2; sums instead of means with length_average=false",
    "IPO, arXiv 2310.12036 eq 17",
    "clean, nearly deterministic labels, which make sigmoid overfit",
    (*SCORED, "length_average"),
    kernel=True,
    divides=lambda options: options.length_average,
)
def ipo(pairs: PairLogps, options: LossOptions) -> Tensor:
    gap = (mean_margin if options.length_average else margin)(pairs, options)
    return (gap - 1 / (2 * options.beta)).square()


@loss(
    "relu(1 - (beta d - m))",
    "RSO, arXiv 2309.06657",
    "pairs that are far enough apart should stop counting",
    SCORED,
    columns=MARGIN,
    kernel=True,
)
def hinge(pairs: PairLogps, options: LossOptions) -> Tensor:
    return torch.relu(1 - less_margin(options.beta * margin(pairs, options), pairs))


@loss(
    "(-(1-eps) LS(x) + eps LS(-x)) / (1 - 2 eps), x = beta d - m",
    "robust DPO, arXiv 2403.00409",
    "a known share of labels is flipped",
    (*SCORED, "label_smoothing"),
    columns=MARGIN,
    kernel=True,
)
def robust(pairs: PairLogps, options: LossOptions) -> Tensor:
    x, eps = less_margin(options.beta * margin(pairs, options), pairs), options.label_smoothing
    return (-(1 - eps) * log_sigmoid(x) + eps * log_sigmoid(-x)) / (1 - 2 * eps)


@loss(
    "S(x)(LS(x) - log(1-eps)) + S(-x)(LS(-x) - log eps), x = beta d - m, eps > 0",
    "EXO, arXiv 2402.00856 eq 16",
    "the reverse KL to the labels instead of sigmoid's forward KL; eps 1e-3 is usual",
    (*SCORED, "label_smoothing"),
    columns=MARGIN,
    needs_options={"label_smoothing": "it takes the logarithm; set it to 1e-3, say"},
)
def exo_pair(pairs: PairLogps, options: LossOptions) -> Tensor:
    x, eps = less_margin(options.beta * margin(pairs, options), pairs), options.label_smoothing
    right = torch.sigmoid(x) * (log_sigmoid(x) - math.log1p(-eps))
    return right + torch.sigmoid(-x) * (log_sigmoid(-x) - math.log(eps))


@loss(
    "-LS(beta a) - LS(-beta a)/2 - LS(-beta b)/2",
    "NCA, arXiv 2402.05369",
    "the chosen log-probs must not fall",
    COMMON,
)
def nca_pair(pairs: PairLogps, options: LossOptions) -> Tensor:
    chosen, rejected = options.beta * pairs.chosen_ratio, options.beta * pairs.rejected_ratio
    return -log_sigmoid(chosen) - 0.5 * log_sigmoid(-chosen) - 0.5 * log_sigmoid(-rejected)


@loss(
    "-LS(beta a - delta) - LS(-(beta b - delta)), delta the running mean of rewards",
    "BCO on pairs, arXiv 2404.04656",
    "each answer should be good or bad by itself, not only better or worse than the other",
    COMMON,
    statistics=("delta",),
)
def bco_pair(pairs: PairLogps, options: LossOptions) -> Tensor:
    delta = 0.0 if pairs.delta is None else pairs.delta
    chosen, rejected = options.beta * pairs.chosen_ratio, options.beta * pairs.rejected_ratio
    return -log_sigmoid(chosen - delta) - log_sigmoid(delta - rejected)


@loss(
    "(a - 1/(2 beta))^2 + (b + 1/(2 beta))^2",
    "SPPO with hard labels, arXiv 2405.00675 algorithm 1",
    "self-play: chosen and rejected log-ratios are pushed to fixed values",
    COMMON,
)
def sppo_hard(pairs: PairLogps, options: LossOptions) -> Tensor:
    place = 1 / (2 * options.beta)
    return (pairs.chosen_ratio - place).square() + (pairs.rejected_ratio + place).square()


@loss(
    "-(1-eps) LS(beta D) - eps LS(-beta D), D = sort(lw - ll) - sort(rw - rl) over the global batch",
    "AOT, arXiv 2406.05882",
    "the whole distribution of margins should move, not each pair's; wants large batches",
    ("beta", *SUM_OPTIONS, "label_smoothing"),
    columns=(),
    coupled=True,
)
def aot(pairs: PairLogps, options: LossOptions) -> Tensor:
    policy = (pairs.chosen - pairs.rejected).sort().values
    chosen, rejected = pairs.reference_chosen, pairs.reference_rejected
    if chosen is not None and rejected is not None:
        policy = policy - (chosen - rejected).sort().values
    return smoothed(options.beta * policy, options.label_smoothing)


@loss(
    "-(1-eps) LS(beta D) - eps LS(-beta D), D = sort(a) - sort(b) over the global batch",
    "AOT unpaired, arXiv 2406.05882",
    "as aot, where chosen and rejected answers do not come in pairs",
    ("beta", *SUM_OPTIONS, "label_smoothing"),
    columns=(),
    coupled=True,
)
def aot_unpaired(pairs: PairLogps, options: LossOptions) -> Tensor:
    gap = pairs.chosen_ratio.sort().values - pairs.rejected_ratio.sort().values
    return smoothed(options.beta * gap, options.label_smoothing)


@loss(
    "1 - S(beta a) + S(beta b)",
    "APO zero, arXiv 2408.06266 eq 7",
    "the chosen answers are better than what the model writes",
    COMMON,
)
def apo_zero(pairs: PairLogps, options: LossOptions) -> Tensor:
    chosen, rejected = options.beta * pairs.chosen_ratio, options.beta * pairs.rejected_ratio
    return torch.sigmoid(-chosen) + torch.sigmoid(rejected)


@loss(
    "S(beta a) + 1 - S(beta (a - b))",
    "APO down, arXiv 2408.06266 eq 8",
    "the chosen answers are worse than what the model writes",
    COMMON,
)
def apo_down(pairs: PairLogps, options: LossOptions) -> Tensor:
    chosen, rejected = options.beta * pairs.chosen_ratio, options.beta * pairs.rejected_ratio
    return torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen)


@loss(
    "-LS(x) (1-g) + exp(-x) g, g = S(x/tau), x = beta d - m",
    "DiscoPOP, arXiv 2406.08414 eq 5",
    "a loss that was found by search",
    (*SCORED, "discopop_tau"),
    columns=MARGIN,
)
def discopop(pairs: PairLogps, options: LossOptions) -> Tensor:
    x = less_margin(options.beta * margin(pairs, options), pairs)
    blend = x / options.discopop_tau
    # exp(-x) S(x/tau) in one exponent: on its own the first factor overflows where the second is 0.
    return -log_sigmoid(x) * torch.sigmoid(-blend) + torch.exp(log_sigmoid(blend) - x)


@loss(
    "-(1-eps) LS(x) - eps LS(-x), x = beta (s(a)/nw - s(b)/nl) - m",
    "length-normalised DPO of Tulu 3, arXiv 2411.15124 eq 6",
    "answers of very unequal length; beta is larger, 2 to 10",
    (*SCORED, "label_smoothing"),
    columns=MARGIN,
    kernel=True,
    divides=lambda options: True,
)
def sigmoid_norm(pairs: PairLogps, options: LossOptions) -> Tensor:
    x = less_margin(options.beta * mean_margin(pairs, options), pairs)
    return smoothed(x, options.label_smoothing)


@loss(
    "-q LS(x) - (1-q) LS(-x), x = beta d - m, q the column soft_label",
    "DNO, arXiv 2404.03715; soft SPPO; cDPO with a rate for each pair",
    "the data say how sure each preference is",
    SCORED,
    columns=(*MARGIN, "soft_label"),
    needs_columns=("soft_label",),
)
def soft(pairs: PairLogps, options: LossOptions) -> Tensor:
    if pairs.soft_label is None:
        raise ValueError("the loss soft needs the column soft_label: the probability of each label")
    x, q = less_margin(options.beta * margin(pairs, options), pairs), pairs.soft_label
    return -q * log_sigmoid(x) - (1 - q) * log_sigmoid(-x)


@loss(
    "-(1-eps) LS(x) - eps LS(-x), x = beta (d - lambda max(0, rw - lw)) - m",
    "DPO-positive, arXiv 2402.13228",
    "pairs that differ in few tokens, where sigmoid lowers both",
    (*SCORED, "label_smoothing", "dpop_lambda"),
    columns=MARGIN,
)
def dpop(pairs: PairLogps, options: LossOptions) -> Tensor:
    penalty = options.dpop_lambda * torch.relu(-pairs.chosen_ratio)
    x = less_margin(options.beta * (margin(pairs, options) - penalty), pairs)
    return smoothed(x, options.label_smoothing)
