"""Lists of token ids out of an Arrow column, for any rows and without a copy of the column."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pyarrow
import pyarrow.compute


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


def gather(column: pyarrow.ChunkedArray, rows: np.ndarray) -> Lists:
    """The lists of these rows, in their order; of a column of lists of lists the inner ones.

    Arrow's own `take` from a column of many chunks joins all of the column first.
    """
    if not len(rows):
        return Lists.of([])
    order = np.argsort(rows, kind="stable")  # by chunk
    ends = np.cumsum([len(chunk) for chunk in column.chunks])
    chunk_of = np.searchsorted(ends, rows[order], side="right")
    cuts = np.flatnonzero(np.diff(chunk_of)) + 1
    parts = [
        column.chunk(number).take(pyarrow.array(mine - (ends[number] - len(column.chunk(number)))))
        for number, mine in zip(chunk_of[[0, *cuts]], np.split(rows[order], cuts))
    ]
    back = np.argsort(order, kind="stable")
    if pyarrow.types.is_list(parts[0].type.value_type):
        counts = _sizes(parts)
        back = runs((np.cumsum(counts) - counts)[back], counts[back])
        parts = [part.flatten() for part in parts]
    sizes = _sizes(parts)
    values = np.concatenate([part.flatten().to_numpy() for part in parts])
    return Lists(values, (np.cumsum(sizes) - sizes)[back], sizes[back])


def runs(starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """The places start, start + 1, ... of every run, one run after the other."""
    before = np.cumsum(sizes) - sizes
    return np.repeat(starts - before, sizes) + np.arange(int(sizes.sum()))


def _sizes(parts: list[pyarrow.ListArray]) -> np.ndarray:
    sizes = [pyarrow.compute.list_value_length(part).to_numpy() for part in parts]
    return np.concatenate(sizes).astype(np.int64)
