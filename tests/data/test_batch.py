"""Layouts and the sampler against hand-made expectations."""

import pytest
import torch

from dpo_fast.data import kinds
from dpo_fast.data.batch import collate, collate_trees
from dpo_fast.data.kinds import ExampleLengths
from dpo_fast.data.layouts import LAYOUTS
from dpo_fast.data.sampler import Sampler
from dpo_fast.ops.segments import sum_sequences

PAIRS = [
    {"prompt_ids": [10, 11], "chosen_ids": [20, 21, 2], "rejected_ids": [30, 2]},
    {"prompt_ids": [12], "chosen_ids": [2], "rejected_ids": [31, 32, 33, 2]},
]


def test_padded():
    batch = collate(PAIRS, "padded", pad_id=9, indices=[7, 3])
    assert batch.input_ids.tolist() == [
        [10, 11, 20, 21],  # the last token predicts nothing and is left out
        [10, 11, 30, 9],
        [12, 9, 9, 9],
        [12, 31, 32, 33],
    ]
    assert batch.attention_mask.sum(1).tolist() == [4, 3, 1, 4]
    assert batch.position_ids[1].tolist() == [0, 1, 2, 3]
    # Row 1 of sequence 0 (token 11) predicts 20; sequences begin at rows 0, 4, 8 and 12.
    assert batch.rows_T.tolist() == [1, 2, 3, 5, 6, 8, 12, 13, 14, 15]
    assert batch.targets_T.tolist() == [20, 21, 2, 30, 2, 2, 31, 32, 33, 2]
    assert batch.lengths_S.tolist() == [3, 2, 1, 4]
    assert batch.indices_P.tolist() == [7, 3]
    assert (batch.tokens, batch.num_examples, batch.chosen_tokens) == (16, 2, 4)
    assert batch.padding_fraction == 4 / 16


def test_packed():
    batch = collate(PAIRS, "packed")
    assert batch.input_ids.tolist() == [[10, 11, 20, 21, 10, 11, 30, 12, 12, 31, 32, 33]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2, 0, 0, 1, 2, 3]]
    assert batch.spans == ((4, 0, -1), (3, 0, -1), (1, 0, -1), (4, 0, -1))
    assert batch.attention_mask is None
    assert batch.rows_T.tolist() == [1, 2, 3, 5, 6, 7, 8, 9, 10, 11]
    assert batch.targets_T.tolist() == [20, 21, 2, 30, 2, 2, 31, 32, 33, 2]
    assert (batch.tokens, batch.padding_fraction) == (16, 0)


def test_shared_prefix():
    batch = collate(PAIRS, "shared_prefix", indices=[7, 3])
    assert batch.input_ids.tolist() == [[10, 11, 20, 21, 30, 12, 31, 32, 33]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 2, 0, 1, 2, 3]]
    # The rejected answer of the first pair continues 2 tokens of the first branch. The chosen one of the
    # second has no token of its own: its only one is the last.
    assert batch.spans == ((4, 0, -1), (1, 2, 0), (1, 0, -1), (3, 1, 2))
    # The prompt's last row (1 and 5) predicts the first token of both answers.
    assert batch.rows_T.tolist() == [1, 2, 3, 1, 4, 5, 5, 6, 7, 8]
    assert batch.targets_T.tolist() == [20, 21, 2, 30, 2, 2, 31, 32, 33, 2]
    assert batch.lengths_S.tolist() == [3, 2, 1, 4]
    assert (batch.tokens, batch.num_examples, batch.padding_fraction) == (16, 2, 0)


FLAGGED = [
    PAIRS[0] | {"chosen_scored": [True, False, True], "rejected_scored": None},
    PAIRS[1] | {"rejected_scored": [False, False, True, True]},
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tokens_that_are_not_scored_are_left_out_of_the_targets_alone(layout):
    whole, batch = collate(PAIRS, layout), collate(FLAGGED, layout)
    kept = torch.tensor([1, 0, 1, 1, 1, 1, 0, 0, 1, 1], dtype=torch.bool)
    assert batch.targets_T.tolist() == [20, 2, 30, 2, 2, 33, 2]
    assert torch.equal(batch.rows_T, whole.rows_T[kept])
    assert batch.lengths_S.tolist() == [2, 2, 1, 2]
    assert torch.equal(batch.input_ids, whole.input_ids)
    assert (batch.tokens, batch.spans, batch.chosen_tokens) == (whole.tokens, whole.spans, 3)
    lengths = ExampleLengths.of(FLAGGED, kinds.PAIRS)
    assert lengths.scored_S.tolist() == batch.lengths_S.tolist()
    assert lengths.take([1]).scored_P.tolist() == [3]
    assert lengths.answers_S.tolist() == [3, 2, 1, 4]


def test_completions_keep_their_order_and_flags_beside_others_of_their_prompt():
    completions = [
        {"prompt_ids": [prompt], "completion_ids": ids, "completion_scored": flags, "label": True}
        for prompt, ids, flags in [
            (5, [1, 2], [False, True]),
            (6, [3], None),
            (5, [4, 2], [True, False]),
        ]
    ]
    batch = collate(completions, "shared_prefix", kind=kinds.COMPLETIONS)
    assert batch.targets_T.tolist() == [2, 3, 4]
    assert batch.indices_P.tolist() == [0, 1, 2]
    assert batch.spans == ((2, 0, -1), (1, 1, 0), (1, 0, -1))


def test_flags_and_tokens_must_be_as_many():
    with pytest.raises(ValueError, match="a pair has 3 tokens and 2 flags"):
        collate([PAIRS[0] | {"chosen_scored": [True, False]}], "packed")


def test_any_number_of_completions():
    trees = [([5, 6], [[1, 2], [3], [4, 4, 2]]), ([7], [[2]])]
    batch = collate_trees(trees, "shared_prefix")
    assert batch.input_ids.tolist() == [[5, 6, 1, 4, 4, 7]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 2, 3, 0]]
    assert batch.spans == ((3, 0, -1), (2, 2, 0), (1, 0, -1))
    assert batch.rows_T.tolist() == [1, 2, 1, 1, 3, 4, 5]
    assert batch.lengths_S.tolist() == [2, 1, 3, 1]
    for layout in LAYOUTS:
        other = collate_trees(trees, layout)
        assert torch.equal(other.targets_T, batch.targets_T)
        assert other.tokens == batch.tokens == 4 + 3 + 5 + 2
        rows = other.input_ids.flatten()[other.rows_T]
        assert rows.tolist() == [6, 1, 6, 6, 4, 4, 7]  # the token before each target


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_is_one_token_and_nothing_scored(layout):
    batch = collate([], layout, pad_id=5)
    assert batch.input_ids.tolist() == [[5]]
    assert (batch.num_examples, batch.tokens, len(batch.rows_T)) == (0, 0, 0)
    assert batch.padding_fraction == 1


def test_bad_layouts_and_pairs_are_named():
    with pytest.raises(ValueError, match="layout='pakced'"):
        collate(PAIRS, "pakced")
    with pytest.raises(ValueError, match="empty chosen_ids"):
        collate([{"prompt_ids": [1], "chosen_ids": [], "rejected_ids": [2]}], "packed")


def test_sums_of_sequences_are_precise_and_differentiable():
    values = torch.full((3000,), 0.1, requires_grad=True)
    lengths = torch.tensor([0, 2999, 0, 1])
    sums = sum_sequences(values, lengths)
    assert sums.dtype == torch.float32
    assert sums.tolist() == pytest.approx([0, 299.9, 0, 0.1], rel=1e-7)
    (sums * torch.tensor([1.0, 2, 3, 4])).sum().backward()
    assert values.grad[[0, 2998, 2999]].tolist() == [2, 2, 4]
    assert sum_sequences(torch.zeros(0), torch.zeros(0, dtype=torch.int64)).tolist() == []


@pytest.mark.parametrize(("micro", "world"), [(1, 1), (2, 1), (4, 2), (1, 8), (3, 2)])
def test_ranks_and_micro_batches_partition_the_global_batch(micro, world):
    sampler = Sampler(
        size=21, global_batch_size=8, micro_batch_size=micro, world_size=world, seed=3
    )
    alone = Sampler(size=21, global_batch_size=8, micro_batch_size=8, seed=3)
    for step in range(6):  # two epochs, whose last batches have 5 pairs
        shares = [sampler.micro_batches(step, rank) for rank in range(world)]
        assert {len(share) for share in shares} == {sampler.accumulation}
        rows = [row for share in shares for micro_batch in share for row in micro_batch]
        assert sorted(rows) == sorted(alone.global_batch(step))
    epochs = [
        [row for step in range(first, first + 3) for row in alone.global_batch(step)]
        for first in (0, 3)
    ]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(21))
    assert epochs[0] != epochs[1]


def test_sampler_depends_on_the_seed_alone():
    make = lambda seed: Sampler(100, 10, 5, seed=seed).global_batch(4)  # noqa: E731
    assert make(1) == make(1) != make(2)
    assert Sampler(5, 2, 2, shuffle=False).global_batch(2) == [4]


def test_rows_are_looked_up_on_the_host():
    """Asking a GPU for them would wait for all that it has to do, in every micro-batch."""
    batch = collate(PAIRS, "padded", indices=[4, 7]).to("meta")
    assert batch.indices_P.tolist() == [4, 7]
    assert {batch.input_ids.device.type, batch.lengths_S.device.type} == {"meta"}
