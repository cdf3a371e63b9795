"""Sequences of tokens as trees, so that no beginning that two of them share is computed twice.

A sequence continues the beginning of an earlier one with which it shares the most. What it has of its own
is a branch. Distinct prompts, distinct sequences and common beginnings of answers all follow from that.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

# (own, prefix, parent) of every branch, in the order of the row: tokens of its own; tokens before them,
# which are the first ones of the sequence of another branch; the place of that branch, which comes before.
Spans = tuple[tuple[int, int, int], ...]


class Row(NamedTuple):
    """Trees along one row.

    spans: its branches. All that continues a token lies directly behind it, before anything else.
    ids: int64 [N], tokens of the branches, one after the other.
    paths: for each sequence, int64, the places in the row of its tokens.
    """

    spans: Spans
    ids: np.ndarray
    paths: list[np.ndarray]


def distinct(sequences: Sequence[np.ndarray]) -> tuple[list[np.ndarray], list[int]]:
    """Sequences without repetition, in the order of their first coming, and the place of each in that."""
    places: dict[bytes, int] = {}
    found = [places.setdefault(ids.tobytes(), len(places)) for ids in sequences]
    kept: dict[int, np.ndarray] = {}
    for place, ids in zip(found, sequences):
        kept.setdefault(place, ids)
    return list(kept.values()), found


def grow(sequences: Sequence[np.ndarray], kin: Sequence[Hashable] | None) -> Row:
    """Lay out distinct sequences along a row, none of them empty.

    kin: a sequence continues one of the same kin; None: each is alone.
    """
    forks = [(-1, 0)] * len(sequences) if kin is None else _forks(sequences, kin)
    order = _order(sequences, forks)
    places, spans, end = {}, [], 0
    paths: list[np.ndarray] = [np.zeros(0, np.int64)] * len(sequences)
    for branch in order:
        parent, prefix = forks[branch]
        own = len(sequences[branch]) - prefix
        behind = np.arange(end, end + own)
        paths[branch] = np.concatenate([paths[parent][:prefix], behind]) if prefix else behind
        if own:
            places[branch] = len(spans)
            spans.append((own, prefix, places[parent] if prefix else -1))
            end += own
    ids = [sequences[branch][forks[branch][1] :] for branch in order]
    return Row(tuple(spans), np.concatenate(ids).astype(np.int64), paths)


def _forks(sequences: Sequence[np.ndarray], kin: Sequence[Hashable]) -> list[tuple[int, int]]:
    """For each sequence the earlier one that it continues, and how many of its tokens; or (-1, 0).

    Of its kin before it, one of its neighbours in alphabetical order shares the most with it.
    """
    forks: list[tuple[int, int]] = []
    alphabetical: dict[Hashable, list[tuple[bytes, int]]] = {}
    for number, (ids, name) in enumerate(zip(sequences, kin)):
        known = alphabetical.setdefault(name, [])
        entry = (ids.astype(">u4").tobytes(), number)  # bytes in the order of tokens
        place = bisect_left(known, entry)
        near = [each for _, each in known[max(place - 1, 0) : place + 1]]
        shared = [(_common(sequences[each], ids), each) for each in near]
        prefix, parent = max(shared, default=(0, -1))
        while prefix and prefix <= forks[parent][1]:  # the fork lies before that branch
            parent = forks[parent][0]
        forks.append((parent if prefix else -1, prefix))
        if prefix < len(ids):  # else all of it lies there already
            known.insert(place, entry)
    return forks


def _common(one: np.ndarray, other: np.ndarray) -> int:
    """How many tokens two sequences begin with alike."""
    size = min(len(one), len(other))
    differ = one[:size] != other[:size]
    return int(differ.argmax()) if differ.any() else size


def _order(sequences: Sequence[np.ndarray], forks: Sequence[tuple[int, int]]) -> list[int]:
    """Branches with what continues them directly behind, the latest fork first.

    So all that sees a token lies in one piece behind it (`AttentionPlan.ends`).
    """
    children: dict[int, list[int]] = {}
    for branch, (parent, _) in enumerate(forks):
        children.setdefault(parent, []).append(branch)
    order, waiting = [], children.get(-1, [])[::-1]
    while waiting:
        branch = waiting.pop()
        order.append(branch)
        waiting += sorted(children.get(branch, ()), key=lambda each: (forks[each][1], -each))
    return order
