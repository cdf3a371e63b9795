"""Sums over contiguous runs of tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def sum_sequences(values_T: Tensor, lengths_S: Tensor) -> Tensor:
    """Sum of each contiguous run of `lengths_S` values, [S] fp32.

    Added up in fp64, in order, one owner per sequence: deterministic, and a completion of thousands of
    tokens loses nothing to rounding.
    """
    sums_S = torch.segment_reduce(values_T.double(), "sum", lengths=lengths_S, unsafe=True)
    return sums_S.float()
