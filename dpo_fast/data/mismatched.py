"""Completions after prompts of other rows: what KTO measures the policy's distance from the reference on.

Row i of a global batch keeps its prompt and gets the completion of row i - 1, the first that of the last
(arXiv 2402.01306 section 4.1). Of pairs, both answers move on in this way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from dpo_fast.data.kinds import Kind


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
    lengths: Mapping[str, np.ndarray], others: Mapping[int, int], max_length: int
) -> dict[str, np.ndarray]:
    """Tokens of prompts and completions of mismatched rows, int64, in the order of `others`."""
    rows, partners = list(others), list(others.values())
    prompt = lengths["prompt"][rows]
    answers = {
        name: np.minimum(values[partners], max_length - prompt)
        for name, values in lengths.items()
        if name != "prompt"
    }
    return {"prompt": prompt, **answers}
