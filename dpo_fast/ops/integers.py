"""Token ids, lengths and counts: any dtype of integers in, int64 within."""

from __future__ import annotations

import torch
from torch import Tensor


def as_int64(x: Tensor, name: str) -> Tensor:
    """The same numbers in int64; x itself if they are.

    Raises:
        ValueError: bool, floats or complex numbers.
    """
    if x.dtype == torch.bool or x.dtype.is_floating_point or x.dtype.is_complex:
        raise ValueError(
            f"{name} are {x.dtype}; expected torch.int64, or another dtype of integers"
        )
    return x.long()
