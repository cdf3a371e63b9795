"""Examples that are nearly the same: MinHash over runs of tokens, linear in tokens and rows.

Every run of `RUN` tokens has a hash. Its last bits choose one of `BINS`, and each bin keeps the least hash
of a text (one-permutation hashing, Li et al. 2012; empty bins borrow from the next, Shrivastava and Li
2014). Two texts that have the share s of their runs in common agree in about the share s of their bins.
Texts that agree in a whole band of bins are compared with the first of these. Runs that stand in a fifth of
all texts, such as a system prompt or the words of a template, do not count.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dpo_fast.data.facts import flat_slices, mix

RUN = 5  # tokens
BINS = 64
BAND = 4  # bins that must agree, all of them
ALIKE = 0.8  # share of the bins from which on texts are nearly the same
COMMON = 0.2  # share of the texts
SAMPLE = 512  # texts in which common runs are looked for
FEW = 50  # texts below which nothing is common
EMPTY = np.uint32(0xFFFFFFFF)
_POWERS = (np.arange(1, RUN + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)) | np.uint64(1)


def signatures(parts: list[Any], names: tuple[str, ...]) -> np.ndarray:
    """The bins of every text, uint32 [P, BINS], of several data sets one after the other.

    names: columns of ids whose tokens together are the text.
    """
    common = _common_runs(parts, names)
    rows = [_bins(*runs, common) for part in parts for runs in _runs(part, names)]
    return np.concatenate(rows) if rows else np.empty((0, BINS), np.uint32)


def clusters(bins: np.ndarray) -> np.ndarray:
    """For every text the place of the first that is nearly the same, or its own, int64 [P]."""
    first = np.arange(len(bins))
    filled = _filled(bins)
    for start in range(0, BINS, BAND):
        keys = np.zeros(len(bins), np.uint64)
        for column in range(start, start + BAND):
            keys = mix(keys + filled[:, column])
        order = np.argsort(keys, kind="stable")
        same = keys[order][1:] == keys[order][:-1]
        # The first text of each stretch of equal keys, for every text in it.
        heads = order[np.maximum.accumulate(np.where(np.r_[False, same], 0, np.arange(len(order))))]
        pairs = np.stack([heads, order], axis=1)[np.r_[False, same]]
        pairs = pairs[_agreement(bins, pairs) >= ALIKE]
        for a, b in pairs.tolist():
            a, b = _root(first, a), _root(first, b)
            first[max(a, b)] = min(a, b)
    for index in range(len(first)):
        first[index] = first[first[index]]
    return first


def _root(first: np.ndarray, index: int) -> int:
    while first[index] != index:
        first[index] = first[first[index]]
        index = first[index]
    return index


def _runs(examples: Any, names: tuple[str, ...]):
    """Hashes of all runs of tokens, with the text of each, and how many texts there are; in slices."""
    for slices in zip(*(flat_slices(examples, name) for name in names)):
        count = len(slices[0][1])
        hashes, texts = [], []
        for values_T, sizes_P in slices:
            found, places = _of_column(values_T, sizes_P)
            hashes.append(found)
            texts.append(places)
        yield np.concatenate(hashes), np.concatenate(texts), count


def _of_column(values_T: np.ndarray, sizes_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A shorter text is one run."""
    texts_T = np.repeat(np.arange(len(sizes_P)), sizes_P)
    tokens_T = mix(values_T.astype(np.uint64))
    left_T = np.repeat(np.cumsum(sizes_P), sizes_P) - np.arange(len(values_T))
    padded = np.concatenate([tokens_T, np.zeros(RUN, np.uint64)])
    runs_T = np.zeros(len(values_T), np.uint64)
    for place in range(RUN):
        runs_T += (
            np.where(left_T > place, padded[place : place + len(values_T)], 0) * _POWERS[place]
        )
    whole = left_T >= np.minimum(RUN, np.repeat(sizes_P, sizes_P))
    return mix(runs_T[whole]), texts_T[whole]


def _common_runs(parts: list[Any], names: tuple[str, ...]) -> np.ndarray:
    total = sum(map(len, parts))
    if total < FEW:
        return np.empty(0, np.uint64)
    seen, looked = [], 0
    for part in parts:
        for hashes, texts, count in _runs(part, names):
            kept = texts < SAMPLE - looked
            apart = hashes[kept] ^ mix(texts[kept].astype(np.uint64))
            seen.append(hashes[kept][np.unique(apart, return_index=True)[1]])
            looked += min(count, SAMPLE - looked)
            break  # the first slice of each is enough
    values, counts = np.unique(np.concatenate(seen), return_counts=True)
    return values[counts > COMMON * looked]


def _bins(hashes: np.ndarray, texts: np.ndarray, count: int, common: np.ndarray) -> np.ndarray:
    if len(common):
        own = ~np.isin(hashes, common)
        hashes, texts = hashes[own], texts[own]
    bins = np.full(count * BINS, EMPTY, np.uint32)
    places = texts * BINS + (hashes % np.uint64(BINS)).astype(np.int64)
    np.minimum.at(bins, places, (hashes >> np.uint64(33)).astype(np.uint32))
    return bins.reshape(count, BINS)


def _filled(bins: np.ndarray) -> np.ndarray:
    """Empty bins have the value of the next one that is not. A text without any stays alone."""
    filled = bins.astype(np.uint64)
    empty = bins == EMPTY
    filled[empty.all(axis=1), :] = np.arange(int(empty.all(axis=1).sum()), dtype=np.uint64)[
        :, None
    ] + (np.uint64(1) << np.uint64(40))
    rows = np.flatnonzero(empty.any(axis=1) & ~empty.all(axis=1))
    part = bins[rows]
    while (holes := part == EMPTY).any():
        part = np.where(holes, np.roll(part, -1, axis=1), part)
    filled[rows] = part
    return filled


def _agreement(bins: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """The share of the bins of either text in which both agree."""
    shares = [np.empty(0)]
    for start in range(0, len(pairs), 65536):
        a, b = (bins[side] for side in pairs[start : start + 65536].T)
        either = (a != EMPTY) | (b != EMPTY)
        shares.append(((a == b) & either).sum(axis=1) / np.maximum(either.sum(axis=1), 1))
    return np.concatenate(shares)
