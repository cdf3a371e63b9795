"""Orders of a user's own: what they see, what they may give, and what is refused."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dpo_fast.data.kinds import PAIRS, ExampleLengths
from dpo_fast.data.own_order import OwnOrder, Rows, check_sampler
from dpo_fast.data.sampler import Sampler
from dpo_fast.errors import UserError

LENGTHS = ExampleLengths(
    PAIRS, np.array([5, 3, 9, 1]), np.array([1, 2, 1, 7, 2, 2, 4, 3]), np.full(4, 2)
)


class Examples:
    """Four pairs."""

    lengths, numbers = LENGTHS, ["weight"]

    def __len__(self):
        return 4

    def __getitem__(self, place):
        return {"prompt_ids": [place]}

    def where(self, place):
        return f"rows.jsonl, line {place + 1}"

    def column(self, name, indices):
        return SimpleNamespace(to_numpy=lambda: np.array([0.5, 1.0, 1.5, 2.0])[indices])


ROWS = Rows(Examples(), seed=7)


def order(give, kl=None) -> OwnOrder:
    check_sampler("mine", give)
    return OwnOrder("mine", give, ROWS, kl)


def shortest_first(rows, epoch):
    return np.argsort(rows.prompt_tokens + rows.longest_answer_tokens, kind="stable")


def drawn(rows, epoch):
    return np.random.default_rng((rows.seed, epoch)).permutation(len(rows))


class OfTorch(torch.utils.data.Sampler):
    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return 4

    def __iter__(self):
        return iter(torch.randperm(4, generator=torch.Generator().manual_seed(self.epoch)).tolist())


def test_rows_tell_lengths_columns_and_where_they_are_from():
    assert ROWS.prompt_tokens.tolist() == [5, 3, 9, 1]
    assert ROWS.longest_answer_tokens.tolist() == [2, 7, 2, 4]
    assert (
        len(ROWS) == 4 and ROWS[2] == {"prompt_ids": [2]} and ROWS.where(3) == "rows.jsonl, line 4"
    )
    assert ROWS.column("weight").tolist() == [0.5, 1.0, 1.5, 2.0]
    with pytest.raises(UserError, match="no column margin; of numbers the run has: weight"):
        ROWS.column("margin")


def test_functions_samplers_of_torch_and_lists_order_the_epochs():
    assert order(shortest_first)(0).tolist() == [3, 0, 1, 2]
    mine = order(drawn)
    assert mine(0).tolist() != mine(1).tolist() and mine(1).tolist() == order(drawn)(1).tolist()
    torchs = order(OfTorch())
    assert torchs(3).tolist() == [*OfTorch_at(3)] and torchs(0).tolist() == [*OfTorch_at(0)]
    assert order([2, 2, 0])(5).tolist() == [2, 2, 0]  # leaves out, and repeats
    assert order(torch.utils.data.SequentialSampler(range(4)))(0).tolist() == [0, 1, 2, 3]
    assert order(shortest_first).identity == order(shortest_first).identity
    assert order(shortest_first).identity != order([3, 0, 2, 1]).identity


def OfTorch_at(epoch):
    sampler = OfTorch()
    sampler.set_epoch(epoch)
    return iter(sampler)


def test_the_sampler_takes_its_batches_from_it_on_any_ranks():
    own = order(drawn)
    one = Sampler(4, 3, 3, own=own, left_out=frozenset({int(own(0)[1])}))
    first, second = own(0).tolist(), own(1).tolist()
    assert one.steps_per_epoch == 2
    assert [one.global_batch(step) for step in range(4)] == [
        *[[first[0], first[2]], first[3:]],
        *[[each for each in part if each != first[1]] for part in (second[:3], second[3:])],
    ]
    two = Sampler(4, 4, 1, world_size=2, own=own)
    assert [two.micro_batches(1, rank) for rank in (0, 1)] == [
        *[[[second[0]], [second[2]]], [[second[1]], [second[3]]]]
    ]


def unseeded(rows, epoch):
    return np.random.permutation(len(rows) * 3) % len(rows)


def shrinking(rows, epoch):
    return range(len(rows) - epoch)


@pytest.mark.parametrize(
    "give, message",
    [
        (unseeded, "gave epoch 0 in another order than the first time.*rows.seed, epoch"),
        (shrinking, "gave 3 places for epoch 1, and 4 for the first"),
        ([0, 4], "gave the place 4, but the run has 4 examples, 0 to 3"),
        ([0, -1], "gave the place -1"),
        ([], "gave nothing: expected places of examples, integers of 0 to 3"),
        ([0.5, 1.0], "gave a list that begins with a float"),
        ([[0, 1], [2]], "gave a list that begins with a list"),
        ([True, False], "gave a list that begins with a bool"),
        (lambda rows, epoch: None, "epoch 0: .*TypeError: 'NoneType' object is not iterable"),
        (lambda rows: [0], r"epoch 0: .*TypeError: .*takes 1 positional argument but 2"),
        (lambda rows, epoch: rows.column("x"), "there is no column x"),
    ],
)
def test_what_is_no_order_is_refused(give, message):
    mine = order(give)
    with pytest.raises(UserError, match=f"train.sampler=mine.*{message}"):
        for epoch in (0, 0, 1):
            mine(epoch)


def test_kl_needs_other_rows_in_every_global_batch():
    assert len(order([0, 1, 1, 2], kl=2)(0)) == 4
    with pytest.raises(UserError, match="an example twice in the global batch from place 0 on"):
        order([1, 1, 0, 2], kl=2)(0)


@pytest.mark.parametrize(
    "give, message",
    [
        (3, "is a int: expected a function of rows and epoch"),
        (
            torch.utils.data.BatchSampler([0, 1], 2, False),
            "is a BatchSampler, but the trainer makes",
        ),
        (
            torch.utils.data.DistributedSampler(range(4), num_replicas=2, rank=0),
            "is a DistributedSampler, but the trainer makes the batches",
        ),
    ],
)
def test_what_is_no_sampler_is_refused(give, message):
    with pytest.raises(UserError, match=f"train.sampler=mine {message}"):
        check_sampler("mine", give)
