"""The blocks in which the examples of a data set are scored, along the order in which a run draws them.

Examples share batches within their block, and batches move the last bits of a value. So where blocks end
follows from the order alone: a short run scores the first of them, a longer one goes on with the others,
and every value is the one that a pass over all of the data would have given. The first blocks are small, so
that a trial of a few steps scores little more than it draws.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

FIRST = 64  # examples of the first block
MOST = 2048  # examples of a block; at most so many are lost when a process is killed


def ends() -> Iterator[int]:
    """Where the blocks end in the order: 64, 128, 256, ..., 2048, and from there on every 2048."""
    end, size = 0, min(FIRST, MOST)
    while True:
        end += size
        yield end
        size = min(end, MOST)


def blocks(order_P: np.ndarray) -> list[np.ndarray]:
    """The places of each block's examples in the data set, ascending.

    order_P: places of all examples that are drawn, each once, int64.
    """
    cuts = list(itertools.takewhile(lambda end: end < len(order_P), ends()))
    return [np.sort(part) for part in np.split(order_P, cuts) if len(part)]
