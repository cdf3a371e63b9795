"""What the answers to one prompt have in common, counted for many examples at once.

The last token of an answer does not reach the backbone, so it is left out everywhere here.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dpo_fast.data.lists import Lists, runs

MIX = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0xBF58476D1CE4E5B9)  # odd numbers without a pattern


class Sharing(NamedTuple):
    """Of the answers of each of P examples, int64 [P] each.

    repeated_P: answers that are an earlier one again.
    repeated_tokens_P: tokens of these.
    common_P: tokens that an earlier answer has at the same place after the same tokens; those of
        repeated answers are among them.
    """

    repeated_P: np.ndarray
    repeated_tokens_P: np.ndarray
    common_P: np.ndarray

    @classmethod
    def none(cls, examples: int) -> Sharing:
        return cls(*(np.zeros(examples, dtype=np.int64) for _ in cls._fields))


def sharing_of(answers: Lists, counts_P: np.ndarray) -> Sharing:
    """Count what answers have in common, exactly but for collisions of 64-bit hashes.

    answers: one example after the other, the last token included. counts_P: answers of each example.
    """
    ids_T, starts_S, sizes_S = answers
    P, bodies_S = len(counts_P), sizes_S - 1
    owner_S = np.repeat(np.arange(P), counts_P)
    hash_S = hashes(Lists(ids_T, starts_S, bodies_S))
    order = np.lexsort((hash_S, owner_S))  # stable: of equal answers the earliest comes first
    again = np.zeros(len(order), dtype=bool)
    again[1:] = (np.diff(owner_S[order]) == 0) & (np.diff(hash_S[order]) == 0)
    repeats, firsts = order[again], np.sort(order[~again])
    repeated_P = np.bincount(owner_S[repeats], minlength=P)
    tokens_P = np.bincount(owner_S[repeats], bodies_S[repeats], minlength=P).astype(np.int64)
    common_P = _common(ids_T, starts_S[firsts], bodies_S[firsts], owner_S[firsts], P)
    return Sharing(repeated_P, tokens_P, tokens_P + common_P)


def _common(
    ids_T: np.ndarray, starts: np.ndarray, sizes: np.ndarray, owner: np.ndarray, P: int
) -> np.ndarray:
    """Tokens that distinct answers share, [P]: token by token, for as long as some go on together."""
    common_P = np.zeros(P, dtype=np.int64)
    together, place = owner, 0  # those that have had the same tokens so far have the same number
    while len(starts):
        left = sizes > place
        starts, sizes, owner, together = starts[left], sizes[left], owner[left], together[left]
        tokens = ids_T[starts + place].astype(np.int64) & 0xFFFFFFFF  # those of images are below 0
        keys = together << 32 | tokens
        _, first, together, counts = np.unique(
            keys, return_index=True, return_inverse=True, return_counts=True
        )
        common_P += np.bincount(owner[first], counts - 1, minlength=P).astype(np.int64)
        left = counts[together] > 1
        starts, sizes, owner, together = starts[left], sizes[left], owner[left], together[left]
        place += 1
    return common_P


def hashes(lists: Lists) -> np.ndarray:
    """64-bit hashes of lists of tokens, uint64 [S]: sums of a number for every token and place."""
    ends_S = np.cumsum(lists.sizes_S)
    begins_S = ends_S - lists.sizes_S
    places_T = np.arange(len(places := runs(lists.starts_S, lists.sizes_S)))
    places_T -= np.repeat(begins_S, lists.sizes_S)
    tokens_T = lists.values[places].astype(np.uint64)
    mixed_T = tokens_T * np.uint64(MIX[0]) + (places_T.astype(np.uint64) + 1) * np.uint64(MIX[1])
    mixed_T ^= mixed_T >> np.uint64(31)
    mixed_T *= np.uint64(MIX[2])
    mixed_T ^= mixed_T >> np.uint64(29)
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(mixed_T, dtype=np.uint64)])
    return sums[ends_S] - sums[begins_S]
