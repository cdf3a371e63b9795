"""What of the data says whether training on it can go well: repetitions, lengths, likeness, as shares."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import Any

import numpy as np
import pyarrow

from dpo_fast.data.kinds import PAIRS

LOOKED_AT = 4096  # pairs whose tokens are compared; of more, so many at even distances
ALIKE = 0.9  # of the longer answer, that both begin and end with
SLICE = 16384  # rows that are held in memory at a time
_PRIME = np.uint64(0x9E3779B97F4A7C15)


def data_facts(train: Any, evaluation: Any | None = None) -> dict[str, float]:
    """Numbers about a `Dataset` or `Chunk`, and about what it shares with the evaluation's.

    rows: examples. answer_tokens: scored tokens of an answer, on average.
    prompts_cut, answers_cut, duplicates: shares of the examples.
    chosen_longer: share of the pairs of unequal length (`unequal`, a count) whose chosen answer is longer.
    nearly_equal, contradictory: shares of the pairs.
    leaked: share of the evaluation examples that are trained on.
    """
    report, lengths = train.report, train.lengths
    kept = max(report.examples_kept, 1)
    facts = {
        "rows": float(len(train)),
        "answer_tokens": float(lengths.scored_S.mean()) if len(lengths.scored_S) else 0.0,
        "prompts_cut": report.prompts_cut / kept,
        "answers_cut": min(report.answers_cut / kept, 1.0),
    }
    hashes = {name: text_hashes(train, name) for name in train.kind.ids}
    names = joined(*hashes.values())
    facts["duplicates"] = 1 - len(np.unique(names)) / max(len(names), 1)
    if train.kind == PAIRS and len(train):
        prompt, chosen, rejected = hashes.values()
        turned = np.isin(names, joined(prompt, rejected, chosen))
        facts["contradictory"] = float(turned.mean())
        facts |= _of_lengths(lengths.scored_S) | {"nearly_equal": _nearly_equal(train)}
    if evaluation is not None and evaluation.kind == train.kind:
        others = joined(*(text_hashes(evaluation, name) for name in train.kind.ids))
        facts["leaked"] = float(np.isin(others, names).mean())
    return facts


def text_hashes(examples: Any, name: str) -> np.ndarray:
    """A hash of the tokens of each example in a column, uint64 [P]."""
    parts = [_hashes(values, sizes) for values, sizes in flat_slices(examples, name)]
    return np.concatenate(parts) if parts else np.empty(0, np.uint64)


def flat_slices(examples: Any, name: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The tokens of a column of ids, some rows at a time: all of them in a row, and how many each has.

    The answers of a group count as one.
    """
    for start in range(0, len(examples), SLICE):
        column = examples.column(name, range(start, min(start + SLICE, len(examples))))
        ends = np.array(column.offsets)
        values = column.values
        if pyarrow.types.is_list(values.type) or pyarrow.types.is_large_list(values.type):
            ends, values = np.array(values.offsets)[ends], values.values
        yield values.to_numpy()[ends[0] : ends[-1]], np.diff(ends).astype(np.int64)


def _hashes(values_T: np.ndarray, sizes_P: np.ndarray) -> np.ndarray:
    """Of each run of tokens: a sum over them of token times a power that tells the place, mod 2^64."""
    ends_P = np.cumsum(sizes_P)
    place_T = np.arange(len(values_T)) - np.repeat(ends_P - sizes_P, sizes_P)
    mixed_T = mix(values_T.astype(np.uint64) + place_T.astype(np.uint64) * _PRIME)
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(mixed_T, dtype=np.uint64)])
    return mix(sums[ends_P] - sums[ends_P - sizes_P] + sizes_P.astype(np.uint64))


def mix(values: np.ndarray) -> np.ndarray:
    """Scatter uint64 values: splitmix64."""
    values = values + _PRIME
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def joined(*hashes: np.ndarray) -> np.ndarray:
    """One hash of several, in this order."""
    total = np.zeros_like(hashes[0])
    for each in hashes:
        total = mix(total * _PRIME + each)
    return total


def _of_lengths(scored_S: np.ndarray) -> dict[str, float]:
    """How often the chosen answer is the longer one."""
    more_P = scored_S[0::2] - scored_S[1::2]
    unequal = int(np.count_nonzero(more_P))
    longer = int(np.count_nonzero(more_P > 0))
    return {"unequal": float(unequal), "chosen_longer": longer / unequal if unequal else 0.5}


def _nearly_equal(pairs: Any) -> float:
    looked = range(0, len(pairs), -(-len(pairs) // LOOKED_AT))
    found = (pairs[index] for index in looked)
    alike = (likeness(pair["chosen_ids"], pair["rejected_ids"]) >= ALIKE for pair in found)
    return sum(alike) / len(looked)


def likeness(a: Sequence[int], b: Sequence[int]) -> float:
    """The share of the longer one that both begin with and end with, 0 to 1."""
    longest = max(len(a), len(b))
    if not longest:
        return 1.0
    begin = _common(a, b)
    return (begin + _common(a[begin:][::-1], b[begin:][::-1])) / longest


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    return sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(a, b)))
