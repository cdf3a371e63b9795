"""Many lists of tokens in one array."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Lists(NamedTuple):
    """S lists in one array. values: int32. starts_S, sizes_S: int64, where each begins, and its tokens."""

    values: np.ndarray
    starts_S: np.ndarray
    sizes_S: np.ndarray

    @classmethod
    def of(cls, lists) -> Lists:
        """Of lists of int."""
        sizes_S = np.array(list(map(len, lists)), dtype=np.int64)
        values = np.concatenate([np.zeros(0, np.int32), *(np.asarray(each) for each in lists)])
        return cls(values.astype(np.int32), np.cumsum(sizes_S) - sizes_S, sizes_S)

    def interleaved(self, other: Lists) -> Lists:
        """The first of these, the first of the others, the second of these, ..."""
        starts = np.stack([self.starts_S, other.starts_S + len(self.values)], axis=1)
        sizes = np.stack([self.sizes_S, other.sizes_S], axis=1)
        values = np.concatenate([self.values, other.values])
        return Lists(values, starts.reshape(-1), sizes.reshape(-1))


def runs(starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """The places start, start + 1, ... of every run, one run after the other."""
    before = np.cumsum(sizes) - sizes
    return np.repeat(starts - before, sizes) + np.arange(int(sizes.sum()))
