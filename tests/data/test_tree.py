"""Trees along a row, and what answers have in common, against the definition."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_fast.data.lists import Lists
from dpo_fast.data.sharing import hashes, sharing_of
from dpo_fast.data.tree import distinct, grow

TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=7).map(tuple)
MANY = st.lists(TOKENS, min_size=1, max_size=9)


def beginnings(sequences) -> set[tuple[int, ...]]:
    return {sequence[:end] for sequence in sequences for end in range(1, len(sequence) + 1)}


@settings(deadline=None, max_examples=200)
@given(MANY, st.booleans())
def test_a_row_holds_every_beginning_once_and_every_sequence(sequences, share):
    alone, places = distinct([np.array(each) for each in sequences])
    row = grow(alone, ["kin"] * len(alone) if share else None)
    assert [tuple(row.ids[row.paths[place]]) for place in places] == sequences
    once = set(sequences)
    assert len(row.ids) == len(beginnings(once)) if share else sum(map(len, once))
    assert len(row.ids) == sum(own for own, *_ in row.spans)
    continued = [[] for _ in row.ids]  # the places that see each token
    for path in row.paths:
        for first, token in enumerate(path):
            continued[token] += path[first:].tolist()
    for token, seen_by in enumerate(continued):  # in one piece, directly behind it
        assert sorted(set(seen_by)) == list(range(token, max(seen_by) + 1))


def test_the_order_of_a_row():
    """A branch stands behind the one that it continues, the latest fork first, else as they come."""
    sequences = [(1, 2, 3, 4), (1, 2, 5), (9, 9), (1, 2, 3, 6, 7), (1, 2, 3, 6, 8), (1, 2, 3)]
    row = grow([np.array(each) for each in sequences], ["kin"] * 6)
    assert row.ids.tolist() == [1, 2, 3, 4, 6, 7, 8, 5, 9, 9]
    assert row.spans == ((4, 0, -1), (2, 3, 0), (1, 4, 1), (1, 2, 0), (2, 0, -1))
    assert row.paths[5].tolist() == [0, 1, 2]
    kin = grow([np.array(each) for each in sequences], [0, 1, 0, 0, 1, 0])
    assert kin.spans == ((4, 0, -1), (2, 3, 0), (3, 0, -1), (3, 2, 2), (2, 0, -1))


@settings(deadline=None, max_examples=200)
@given(st.lists(MANY, min_size=1, max_size=5))
def test_what_answers_have_in_common_is_counted(examples):
    answers = Lists.of([answer for each in examples for answer in each])
    found = sharing_of(answers, np.array(list(map(len, examples))))
    for example, repeated, tokens, common in zip(examples, *found):
        bodies = [answer[:-1] for answer in example]
        assert repeated == len(bodies) - len(set(bodies))
        assert tokens == sum(map(len, bodies)) - sum(map(len, set(bodies)))
        assert common == sum(map(len, bodies)) - len(beginnings(bodies))


def test_hashes_tell_tokens_places_and_lengths_apart():
    lists = [(), (0,), (0, 0), (1, 2), (2, 1), (3,), (2, 1), (1, 2, 0)]
    together = Lists.of(lists)
    found = hashes(together).tolist()
    assert found[4] == found[6] and len(set(found)) == len(lists) - 1
    twice = Lists(together.values, together.starts_S[[3, 3]], np.array([2, 2]))
    assert hashes(twice).tolist() == [found[3]] * 2
    assert hashes(Lists.of([])).tolist() == []


@pytest.mark.slow
def test_hashes_of_many_lists_do_not_collide():
    draw = np.random.default_rng(0)
    flat, starts = draw.integers(0, 3, 40_000), np.arange(0, 39_000, 2)
    sizes = draw.integers(0, 900, len(starts))
    lists = {flat[start : start + size].tobytes() for start, size in zip(starts, sizes)}
    assert len(set(hashes(Lists(flat, starts, sizes)).tolist())) == len(lists)
