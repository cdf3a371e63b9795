"""A series of times in three numbers."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Times(NamedTuple):
    """The 20th, 50th and 80th percentile, in the unit of the series."""

    p20: float
    p50: float
    p80: float


def summary(series: list[float]) -> Times:
    limits = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    return Times(*torch.tensor(series, dtype=torch.float64).quantile(limits).tolist())
