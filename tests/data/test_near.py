"""Texts that are nearly the same are found, others are not, and a shared beginning does not count."""

import random

import numpy as np
import pyarrow
import pytest

from dpo_fast.data.near import BINS, EMPTY, clusters, signatures


class Lists:
    """Rows of token ids in one column, as `Dataset` gives them."""

    def __init__(self, lists):
        self.lists = lists

    def __len__(self):
        return len(self.lists)

    def column(self, name, indices):
        return pyarrow.array(
            [self.lists[index] for index in indices], pyarrow.list_(pyarrow.int64())
        )


def texts(count: int, size: int = 120, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(5000) for _ in range(size)] for _ in range(count)]


def first_alike(*parts: list[list[int]]) -> list[int]:
    return clusters(signatures([Lists(part) for part in parts], ("ids",))).tolist()


def test_changed_words_are_found_and_other_texts_are_not():
    rows = texts(300)
    for index in range(0, 100, 10):  # one token of 120 changed: 115 of 125 runs are shared
        copy = list(rows[index])
        copy[60] = 9999
        rows[200 + index // 10] = copy
    found = first_alike(rows)
    expected = list(range(300))
    expected[200:210] = range(0, 100, 10)
    assert found == expected


def test_half_of_a_text_is_not_nearly_the_same():
    rows = texts(100)
    rows[50] = rows[0][:60] + texts(1, 60, seed=1)[0]
    assert first_alike(rows) == list(range(100))


def test_what_all_texts_begin_with_does_not_count():
    system = texts(1, 400, seed=2)[0]
    rows = [system + row for row in texts(80, 30)]
    rows[70] = rows[3]
    found = first_alike(rows)
    assert found == [*range(70), 3, *range(71, 80)]
    rows[5] = rows[6] = list(system)  # nothing of their own: they are like nobody
    assert first_alike(rows)[5:7] == [5, 6]


@pytest.mark.parametrize("size", [1, 3, 6, 12])
def test_short_texts(size):
    rows = texts(90, size)
    rows[80] = list(rows[4])
    assert first_alike(rows)[80] == 4 and len(set(first_alike(rows))) == 89


def test_across_data_sets_and_slices(monkeypatch):
    from dpo_fast.data import facts

    train, evaluation = texts(60), texts(20, seed=3)
    evaluation[7] = list(train[33])
    expected = [*range(67), 33, *range(68, 80)]
    assert first_alike(train, evaluation) == expected
    monkeypatch.setattr(facts, "SLICE", 16)
    assert first_alike(train, evaluation) == expected


def test_bins_of_two_texts_agree_in_their_share_of_runs():
    draw, errors = random.Random(5), []
    for share in (0.5, 0.8, 0.9):
        for _ in range(30):
            a = [draw.randrange(10**6) for _ in range(600)]
            b = a[: int(600 * share)] + [
                draw.randrange(10**6) for _ in range(int(600 * (1 - share)))
            ]
            bins = signatures([Lists([a, b])], ("ids",))
            assert bins.shape == (2, BINS) and (bins != EMPTY).mean() > 0.95
            runs = [{tuple(row[i : i + 5]) for i in range(len(row) - 4)} for row in (a, b)]
            truth = len(runs[0] & runs[1]) / len(runs[0] | runs[1])
            errors.append((bins[0] == bins[1]).mean() - truth)
    assert abs(np.mean(errors)) < 0.02 and np.std(errors) < 0.09
