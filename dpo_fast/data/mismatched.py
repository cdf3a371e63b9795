"""Completions after prompts of other rows: what KTO measures the policy's distance from the reference on.

Row i of a global batch keeps its prompt and gets the completion of row i - 1, the first that of the last
(arXiv 2402.01306 section 4.1). Of pairs, both answers move on in this way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from dpo_fast.data.kinds import Kind, RowLengths


def partners(rows: Sequence[int], size: int) -> dict[int, int]:
    """The row whose completion each row of a global batch gets, rows in their order.

    size: rows of the data, at least 2. A global batch of one row, as an epoch may end with, has nobody to
    exchange with and takes the completion of the next row of the data.
    """
    if len(rows) == 1:
        return {rows[0]: (rows[0] + 1) % size}
    return dict(zip(rows, [*rows[-1:], *rows[:-1]]))


def mismatched(row: Mapping, other: Mapping, kind: Kind, max_length: int) -> dict:
    """A row with the other's completions, of which what exceeds max_length tokens is cut off."""
    room = max_length - len(row["prompt_ids"])
    return {**row, **{name: other[name][:room] for name in kind.ids[1:]}}


def mismatched_lengths(
    lengths: RowLengths, others: Mapping[int, int], max_length: int
) -> RowLengths:
    """Of mismatched rows, in the order of `others`."""
    own, foreign = lengths.take(list(others)), lengths.take(list(others.values()))
    room_A = max_length - np.repeat(own.prompt_R, foreign.counts_R)
    return replace(foreign, prompt_R=own.prompt_R, answers_A=np.minimum(foreign.answers_A, room_A))
