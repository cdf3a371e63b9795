"""Batches of groups: any number of answers to a prompt, in every layout."""

import random

import numpy as np
import pytest
import torch

from dpo_fast.data.batch import collate
from dpo_fast.data.kinds import GROUPS, ExampleLengths
from dpo_fast.data.layouts import LAYOUTS

ROWS = [
    {"prompt_ids": [1, 2, 3], "completions_ids": [[4, 5], [6], [7, 8, 9]],
     "scores": [0.5, -1.0, 2.0], "weight": 1.0},
    {"prompt_ids": [1, 9], "completions_ids": [[10], [11, 12]], "scores": [3.0, 3.0], "weight": 2.0},
    {"prompt_ids": [1, 2, 3], "completions_ids": [[13], [14], [15, 16], [17]],
     "scores": [0.0, 1.0, 2.0, 3.0], "weight": 3.0},
]  # fmt: skip


def lay_out(rows, layout, **options):
    return collate(rows, layout, kind=GROUPS, **options)


def test_each_group_has_its_prompt_once():
    batch = lay_out(ROWS[:2], "shared_prefix", indices=[30, 10], columns=["weight"])
    assert batch.spans == ((4, 0, -1), (2, 3, 0), (2, 0, -1), (1, 2, 2))
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 7, 8, 1, 9, 11]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 3, 4, 0, 1, 2]]
    assert batch.targets_T.tolist() == [4, 5, 6, 7, 8, 9, 10, 11, 12]
    assert batch.rows_T.tolist() == [2, 3, 2, 2, 4, 5, 7, 7, 8]
    assert batch.columns["weight"].tolist() == [1, 2]
    assert (batch.num_examples, batch.tokens, batch.desirable_S) == (2, 3 * 3 + 6 + 2 * 2 + 3, None)
    # Groups of one prompt have it once too, and stay two: what is compared does not depend on the batch.
    both = lay_out([ROWS[0], ROWS[2]], "shared_prefix")
    assert both.input_ids.tolist() == [[1, 2, 3, 4, 7, 8, 15]]
    assert both.counts_P.tolist() == [3, 4]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_agree_on_what_is_scored(layout):
    batch = lay_out(ROWS, layout, indices=[5, 6, 7])
    assert batch.targets_T.tolist() == [*range(4, 18)]
    assert batch.lengths_S.tolist() == [2, 1, 3, 1, 2, 1, 1, 2, 1]
    assert batch.counts_P.tolist() == [3, 2, 4] and batch.counts_P.dtype == torch.int64
    assert batch.scores_S.tolist() == [0.5, -1.0, 2.0, 3.0, 3.0, 0.0, 1.0, 2.0, 3.0]
    assert batch.scores_S.dtype == torch.float32
    assert batch.indices_P.tolist() == [5, 6, 7]
    before = batch.input_ids.flatten()[batch.rows_T].tolist()
    assert before == [3, 4, 3, 3, 7, 8, 9, 9, 11, 3, 3, 3, 15, 3]  # the token before each target
    empty = lay_out([], layout, columns=["weight"])
    assert (empty.num_examples, empty.input_ids.shape, len(empty.columns["weight"])) == (
        0,
        (1, 1),
        0,
    )
    assert (empty.scores_S.shape, empty.scores_S.dtype) == ((0,), torch.float32)
    assert (empty.counts_P.shape, empty.counts_P.dtype) == ((0,), torch.int64)
    with pytest.raises(ValueError, match="group of completions with scores has an empty complet"):
        lay_out([ROWS[1] | {"completions_ids": [[10], []]}], layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_costs_are_what_a_batch_takes(layout):
    draw = random.Random(0)
    rows = [
        {"prompt_ids": [place] * draw.randint(1, 30), "scores": [0.0] * count,
         "completions_ids": [[2] * draw.randint(1, 20) for _ in range(count)]}
        for place, count in enumerate((2, 5, 3, 2, 8, 4, 3, 2, 6))
    ]  # fmt: skip
    costs = LAYOUTS[layout].costs(ExampleLengths.of(rows, GROUPS))
    bins = costs.bins(budget := 200, range(len(rows)))
    assert sorted(sum(bins, [])) == list(range(len(rows))) and 1 < len(bins) < len(rows)
    for some in [*bins, *([row] for row in range(len(rows)))]:
        batch = lay_out([rows[row] for row in some], layout)
        assert costs.of(some) == batch.input_ids.numel() <= budget
    assert costs.alone_P.tolist() == [costs.of([row]) for row in range(len(rows))]


def test_lengths_of_rows_of_any_number_of_answers():
    lengths = ExampleLengths.of(ROWS, GROUPS)
    assert lengths.starts_P.tolist() == [0, 3, 5]
    assert (lengths.longest_P.tolist(), lengths.sums_P.tolist()) == ([3, 2, 2], [6, 3, 5])
    assert {name: values.tolist() for name, values in lengths.columns().items()} == {
        "prompt": [3, 2, 3], "completions": [2, 1, 3, 1, 2, 1, 1, 2, 1],
    }  # fmt: skip
    for order in ([2, 0], [1, 1, 2, 0], []):
        taken, truth = lengths.take(order), ExampleLengths.of([ROWS[row] for row in order], GROUPS)
        for name in ("prompt_P", "answers_S", "counts_P", "longest_P", "sums_P"):
            found, wanted = getattr(taken, name), getattr(truth, name)
            assert (found.tolist(), found.dtype) == (wanted.tolist(), np.int64), (name, order)
