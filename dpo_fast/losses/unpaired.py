"""Losses on completions that are desirable or undesirable by themselves.

r is the log-ratio to the reference. On pairs, chosen completions are desirable and rejected ones
undesirable.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dpo_fast.losses.divergence import log_sigmoid
from dpo_fast.losses.logps import SequenceLogps
from dpo_fast.losses.options import LossOptions
from dpo_fast.losses.spec import ALONE, loss

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = ("desirable_weight", "undesirable_weight")


@loss(
    "desirable: wd (1 - S(beta (r - kl))); undesirable: wu (1 - S(beta (kl - r))); "
    "kl = max(0, mean log-ratio of mismatched completions over the global batch)",
    "KTO, arXiv 2402.01306 eq 7",
    "thumbs up or down for single answers; many more of one kind than of the other",
    ("beta", *WEIGHTS, *ALONE),
    kind="completions",
    normaliser="sequences",
    statistics=("kl",),
)
def kto(sequences: SequenceLogps, options: LossOptions) -> Tensor:
    kl = 0.0 if sequences.kl is None else sequences.kl
    gap = options.beta * (sequences.ratio - kl)
    return weighted(sequences, options, torch.sigmoid(torch.where(sequences.desirable, -gap, gap)))


@loss(
    "desirable: -wd LS(beta r - delta); undesirable: -wu LS(delta - beta r); "
    "delta the running mean of rewards",
    "BCO, arXiv 2404.04656",
    "as kto, with a classifier's loss; density-ratio weights, if any, in the column weight",
    ("beta", *WEIGHTS, *ALONE),
    kind="completions",
    normaliser="sequences",
    statistics=("delta",),
)
def bco(sequences: SequenceLogps, options: LossOptions) -> Tensor:
    delta = 0.0 if sequences.delta is None else sequences.delta
    gap = options.beta * sequences.ratio - delta
    return weighted(sequences, options, -log_sigmoid(torch.where(sequences.desirable, gap, -gap)))


@loss(
    "desirable: wd (1 - S(beta r)); undesirable: wu S(beta r)",
    "APO zero, arXiv 2408.06266",
    "as apo_zero, where answers do not come in pairs",
    ("beta", *WEIGHTS, *ALONE),
    kind="completions",
    normaliser="sequences",
)
def apo_zero_unpaired(sequences: SequenceLogps, options: LossOptions) -> Tensor:
    reward = options.beta * sequences.ratio
    return weighted(
        sequences, options, torch.sigmoid(torch.where(sequences.desirable, -reward, reward))
    )


def weighted(sequences: SequenceLogps, options: LossOptions, values: Tensor) -> Tensor:
    """Values times the weight of their side."""
    desirable, undesirable = options.desirable_weight, options.undesirable_weight
    return torch.where(sequences.desirable, desirable * values, undesirable * values)
