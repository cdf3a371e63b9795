"""What a run draws, known before it: with every sampler, of any length, after a checkpoint."""

from types import SimpleNamespace

import numpy as np
import pyarrow
import pytest

from dpo_fast.data.mixture import plan
from dpo_fast.data.packing import Costs
from dpo_fast.data.sampler import Sampler, TokenSampler
from dpo_fast.references import blocks
from dpo_fast.training.drawn import drawn

COUNT = 41
DIGESTS = [f"{index}" for index in range(COUNT)]


class Some:
    """An order of a user's own: another third of the examples in every epoch, and some of them twice."""

    def order(self, epoch: int) -> np.ndarray:
        return np.tile(np.arange(epoch % 3, COUNT, 3)[:13], 2)


def by_tokens(**options) -> TokenSampler:
    return TokenSampler(Costs(np.arange(COUNT) % 7 + 1), 20, 8, **options)


SAMPLERS = {
    "examples": Sampler(COUNT, 6, 2),
    "in order": Sampler(COUNT, 6, 2, shuffle=False),
    "ranks": Sampler(COUNT, 6, 1, world_size=3, seed=4),
    "without some": Sampler(COUNT, 6, 2, left_out=frozenset({3, 5, 40})),
    "mixture": Sampler(30, 6, 2, mixture=plan([11, 30], [0.5, 0.5], [0, 0], "first_exhausted")),
    "own": Sampler(26, 6, 2, own=Some()),
    "tokens": by_tokens(),
    "tokens, ranks, without some": by_tokens(world_size=2, left_out=frozenset({7})),
}


LEAVE_OUT = {"own", "mixture", "without some", "tokens, ranks, without some"}


def split(sampler, steps, digests=DIGESTS):
    examples = SimpleNamespace(digests=pyarrow.array(digests))
    return SimpleNamespace(examples=examples, sampler=sampler, steps=steps)


@pytest.mark.parametrize("most", [4, 16, 2048])
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_run_asks_for_what_it_draws_in_the_blocks_of_any_longer_run(monkeypatch, name, most):
    monkeypatch.setattr(blocks, "FIRST", 4)
    monkeypatch.setattr(blocks, "MOST", most)
    sampler = SAMPLERS[name]
    epoch = sampler.steps_per_epoch
    whole = drawn(split(sampler, range(2 * epoch))).order_P
    longest = [each.tolist() for each in blocks.blocks(whole)]
    for stop in range(2 * epoch):
        for start in {0, stop // 2, stop}:
            found = drawn(split(sampler, range(start, stop)))
            asked = {place for step in range(start, stop) for place in sampler.global_batch(step)}
            assert set(found.wanted_P.nonzero()[0].tolist()) == asked
            assert asked <= set(found.order_P.tolist())
            assert len(found.order_P) == len(set(found.order_P.tolist()))
            of_steps = {place for step in range(stop) for place in sampler.global_batch(step)}
            assert len(found.order_P) <= max(4, 2 * len(of_steps))
            mine = [each.tolist() for each in blocks.blocks(found.order_P)]
            if name in LEAVE_OUT:  # the last block may end with the epoch
                mine = mine[:-1]
            assert mine == longest[: len(mine)]


@pytest.mark.parametrize("name", SAMPLERS)
def test_without_steps_all_examples_are_asked_for_those_that_are_drawn_first(name):
    found, sampler = drawn(split(SAMPLERS[name], None)), SAMPLERS[name]
    assert found.wanted_P is None and sorted(found.order_P) == list(range(COUNT))
    first = drawn(split(sampler, range(1))).order_P
    assert found.order_P[: len(first)].tolist() == first.tolist()


def test_the_order_is_that_of_any_batch_size():
    """So `dpo-fast reference`, on any number of ranks, scores in the blocks of the run."""
    orders = [drawn(split(Sampler(COUNT, size, 1), None)).order_P.tolist() for size in (1, 6, 40)]
    assert orders[0] == orders[1] == orders[2]


def test_rows_of_the_same_tokens_are_scored_once(monkeypatch):
    monkeypatch.setattr(blocks, "FIRST", 2)
    sampler = Sampler(4, 1, 1, shuffle=False)
    found = drawn(split(sampler, range(2), ["a", "a", "b", "c"]))
    assert found.order_P.tolist() == [0, 2]  # a block holds two examples that differ
    assert found.wanted_P.tolist() == [True, True, False, False]
    found = drawn(split(sampler, range(1, 2), ["a", "a", "b", "c"]))
    assert found.order_P.tolist() == [0, 2] and found.wanted_P.tolist() == [
        True,
        True,
        False,
        False,
    ]
    assert drawn(split(sampler, None, ["a", "a", "b", "c"])).order_P.tolist() == [0, 2, 3]
