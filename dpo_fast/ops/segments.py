"""Sums over contiguous runs of tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def sum_sequences(values_T: Tensor, lengths_S: Tensor) -> Tensor:
    """The sum of each run of `lengths_S` values, [S] fp32. The runs lie one after the other.

    Each is added up in fp64 and in order: deterministic, and thousands of tokens lose nothing to rounding.
    """
    sums_S = torch.segment_reduce(values_T.double(), "sum", lengths=lengths_S, unsafe=True)
    return sums_S.float()
