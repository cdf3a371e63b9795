"""Lists of token ids out of an Arrow column, for any rows and without a copy of the column."""

from __future__ import annotations

import numpy as np
import pyarrow
import pyarrow.compute

from dpo_fast.data.lists import Lists, runs


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


def _sizes(parts: list[pyarrow.ListArray]) -> np.ndarray:
    sizes = [pyarrow.compute.list_value_length(part).to_numpy() for part in parts]
    return np.concatenate(sizes).astype(np.int64)
