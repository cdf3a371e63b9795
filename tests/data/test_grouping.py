"""Examples of one prompt in one micro-batch, and what examples really take."""

import datasets
import numpy as np
import pyarrow
import pytest

from dpo_fast.data.batch import collate
from dpo_fast.data.build import features
from dpo_fast.data.dataset import DATASETS
from dpo_fast.data.gather import gather
from dpo_fast.data.grouping import SamePrompt, exact_costs, prompts_of
from dpo_fast.data.kinds import COMPLETIONS, DEMONSTRATIONS, GROUPS, KINDS, PAIRS
from dpo_fast.data.layouts import LAYOUTS
from dpo_fast.data.mismatched import partners
from dpo_fast.data.mixture import plan
from dpo_fast.data.sampler import Sampler, TokenSampler
from dpo_fast.data.stream import Chunk

BY_KIND = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
BY_LAYOUT = pytest.mark.parametrize("layout", LAYOUTS)


def rows_of(kind, prompts: int = 8, most: int = 6, seed: int = 0) -> list[dict]:
    """Pairs of few answers, in an order that scatters them; completions and groups likewise."""
    draw = np.random.default_rng(seed)
    text = lambda low, high: draw.integers(0, 4, int(draw.integers(low, high))).tolist()  # noqa: E731
    rows = []
    for number in range(prompts):
        prompt = [number + 4, *text(0, 12)]
        answers = [text(1, 9) for _ in range(4)]
        for _ in range(int(draw.integers(1, most + 1))):
            some = draw.permutation(4).tolist()
            if kind == PAIRS:
                told = {"chosen_ids": answers[some[0]], "rejected_ids": answers[some[1]]}
            elif kind == DEMONSTRATIONS:
                told = {"completion_ids": answers[some[0]]}
            elif kind == COMPLETIONS:
                told = {"completion_ids": answers[some[0]], "label": bool(some[1] % 2)}
            else:
                told = {"completions_ids": [answers[each] for each in (*some, some[0])]}
                told["scores"] = [0.0] * 5
            rows.append({"prompt_ids": prompt} | told)
    return [rows[place] for place in draw.permutation(len(rows))]


def dataset_of(kind, rows: list[dict], chunk: int = 5):
    """A data set in memory, in record batches of a few rows, as stored ones are."""
    types = features(kind)
    schema = datasets.Features({name: types[name] for name in rows[0]}).arrow_schema
    batches = [
        pyarrow.RecordBatch.from_pylist(rows[first : first + chunk], schema=schema)
        for first in range(0, len(rows), chunk)
    ]
    return DATASETS[kind](datasets.Dataset(pyarrow.Table.from_batches(batches)), report=None)


def taken(rows, places, layout, kind) -> int:
    batch = collate([rows[place] for place in places], layout, kind=kind, indices=places)
    return batch.input_ids.numel()


@BY_LAYOUT
@BY_KIND
@pytest.mark.parametrize("stream", [False, True])
def test_costs_are_what_examples_and_units_really_take(kind, layout, stream, monkeypatch):
    monkeypatch.setattr("dpo_fast.data.grouping.SLICE", 40)  # many slices
    rows = rows_of(kind)
    examples = Chunk(0, 0, rows, [], None, kind) if stream else dataset_of(kind, rows)
    alone = exact_costs(examples, layout)
    assert alone.alone_P.tolist() == [taken(rows, [n], layout, kind) for n in range(len(rows))]
    units = SamePrompt.of(examples, layout).units(range(len(rows)))
    assert max(map(len, units)) > 2
    costs = exact_costs(examples, layout, units)
    assert costs.alone_P.tolist() == [taken(rows, unit, layout, kind) for unit in units]


@BY_LAYOUT
@BY_KIND
def test_a_beginning_of_all_prompts_counts_once_in_a_micro_batch(kind, layout, monkeypatch):
    monkeypatch.setattr("dpo_fast.data.grouping.SLICE", 200)
    rows = rows_of(kind, prompts=12)
    rows = [row | {"prompt_ids": [1] * 30 + row["prompt_ids"]} for row in rows]
    same = SamePrompt.of(dataset_of(kind, rows), layout)
    assert same.alone.common == (30 if LAYOUTS[layout].shares_prompts else 0)
    alone = [taken(rows, [place], layout, kind) for place in range(len(rows))]
    assert same.alone.alone_P.tolist() == alone
    budget = max(*alone, 300)
    bins = TokenSampler(same.alone, budget, 8, same_prompt=same)._bins(0)
    sizes = [taken(rows, mine, layout, kind) for mine in bins]
    assert max(sizes) <= budget and sum(sizes) == bins.tokens
    short = [row | {"prompt_ids": [1] * 9 + row["prompt_ids"][30:]} for row in rows]
    assert SamePrompt.of(dataset_of(kind, short), layout).alone.common == 0


@pytest.mark.parametrize("seed", range(5))
def test_units_hold_the_examples_of_a_prompt_once(seed):
    draw = np.random.default_rng(seed)
    prompts = draw.integers(0, 7, 30)
    same = SamePrompt(prompts, None)
    order = np.concatenate([draw.permutation(30), draw.integers(0, 30, 12)])  # some come again
    order = draw.permutation(order)
    units = same.units(order)
    assert sorted(np.concatenate(units).tolist()) == sorted(order.tolist())
    places = []
    for unit in units:
        assert len(set(prompts[unit])) == 1 and sorted(set(unit)) == unit.tolist()
        places.append(min(np.flatnonzero(order == unit[0])))
    copies = np.bincount(order, minlength=30)
    assert len(units) == sum(copies[prompts == prompt].max() for prompt in set(prompts))
    firsts = [unit[0] for unit in units if copies[unit[0]] == 1]  # they stand where these stood
    assert firsts == [each for each in order.tolist() if each in firsts]
    assert same.order(order).tolist() == np.concatenate(units).tolist()
    assert same.units([]) == [] and same.order([]).tolist() == []


def test_large_units_come_no_earlier_than_small_ones():
    prompts = np.array([0] * 30 + list(range(1, 31)))
    same, places = SamePrompt(prompts, None), []
    for seed in range(200):
        units = same.units(np.random.default_rng(seed).permutation(60))
        places.append(next(n for n, unit in enumerate(units) if len(unit) == 30))
    assert 12 < np.mean(places) < 18  # of 31 places; the first of thirty examples would come 1st


@BY_LAYOUT
@BY_KIND
def test_micro_batches_of_tokens_hold_whole_units_and_are_counted_exactly(kind, layout):
    rows = rows_of(kind, prompts=12)
    same = SamePrompt.of(dataset_of(kind, rows), layout)
    budget = max(int(same.alone.alone_P.max()), 90)
    alone = {rank: TokenSampler(same.alone, budget, 8, rank) for rank in (1, 2)}
    grouped = {rank: TokenSampler(same.alone, budget, 8, rank, same_prompt=same) for rank in (1, 2)}
    bins = [grouped[1]._bins(epoch) for epoch in range(2)]
    for epoch in bins:
        assert sorted(np.concatenate(list(epoch)).tolist()) == list(range(len(rows)))
        sizes = [taken(rows, mine, layout, kind) for mine in epoch]
        assert max(sizes) <= budget and sum(sizes) == epoch.tokens
        for mine in epoch:  # a prompt is in two only where one cannot hold it
            for prompt in set(same.prompts_P[mine].tolist()):
                unit = np.flatnonzero(same.prompts_P == prompt)
                assert set(unit) <= set(mine) or taken(rows, unit, layout, kind) > budget
    assert list(bins[0]) != list(bins[1])
    assert list(grouped[2]._bins(0)) == list(bins[0])
    assert len(bins[0]) <= len(alone[1]._bins(0))
    assert grouped[1].fill == bins[0].tokens / (len(bins[0]) * budget)
    in_order = TokenSampler(same.alone, budget, 8, shuffle=False, same_prompt=same)
    assert sorted(in_order.global_batch(0)) != [] and list(in_order._bins(0)) == list(
        in_order._bins(1)
    )


def test_a_unit_that_is_too_large_is_cut():
    rows = [
        {"prompt_ids": [9, 9], "chosen_ids": [n, 1, 1, 1], "rejected_ids": [n, 2, 2, 2]}
        for n in range(7)
    ]
    same = SamePrompt.of(dataset_of(PAIRS, rows), "shared_prefix")
    found, used = same.bins(20, range(7))
    assert sorted(map(len, found)) == [2, 2, 3] and used == 3 * 2 + 7 * 5
    with pytest.raises(ValueError, match="more than 6 tokens"):
        same.bins(6, range(7))


def test_a_count_sampler_puts_those_of_a_prompt_side_by_side():
    prompts = np.repeat(np.arange(10), 6)
    draw = np.random.default_rng(0).permutation(60)
    same = SamePrompt(prompts[draw], None)
    sampler = Sampler(60, 12, 6, world_size=2, seed=3, same_prompt=same)
    seen = []
    for step in range(10):  # two epochs
        for rank in range(2):
            (mine,) = sampler.micro_batches(step, rank)
            assert len(set(same.prompts_P[mine].tolist())) == 1
            seen.append(mine)
        other = Sampler(60, 12, 3, world_size=1, seed=3, same_prompt=same)
        assert sampler.global_batch(step) == other.global_batch(step)
    flat = [sum(seen[:10], []), sum(seen[10:], [])]
    assert sorted(flat[0]) == sorted(flat[1]) == list(range(60)) and flat[0] != flat[1]


def test_copies_that_a_mixture_draws_stay_apart():
    """A source that is drawn three times in an epoch is not trained on three times in one micro-batch."""
    mixture = plan([4, 12], [1.0, 1.0], [0, 0], "all_exhausted")
    prompts = np.array([0, 0, 1, 1, *range(2, 14)])
    same = SamePrompt(prompts, lambda units: None)
    units = same.units(mixture.examples(0, 0))
    copies = [tuple(unit) for unit in units if unit[0] < 4]
    assert sorted(copies) == [(0, 1)] * 3 + [(2, 3)] * 3


def test_lists_are_gathered_from_chunks_in_any_order():
    values = [[1], [], [2, 3], [4, 5, 6], [], [7]]
    chunks = [pyarrow.array(each) for each in (values[:2], values[2:5], values[5:])]
    found = gather(pyarrow.chunked_array(chunks), np.array([5, 2, 2, 1, 0]))
    lists = [
        found.values[start : start + size].tolist()
        for start, size in zip(found.starts_S, found.sizes_S)
    ]
    assert lists == [[7], [2, 3], [2, 3], [], [1]]


def test_a_mismatched_completion_is_of_another_prompt():
    """KTO's kl: brought together, the example before is one of the same prompt."""
    batch = [4, 5, 6, 9, 10, 20, 21, 22]
    prompts = [1, 1, 1, 2, 2, 3, 3, 3]
    of = dict(zip(batch, prompts))
    found = partners(batch, 30, prompts)
    assert sorted(own for own, _ in found) == sorted(other for _, other in found) == batch
    assert all(of[own] != of[other] for own, other in found)
    assert partners(batch, 30) == list(zip(batch, [22, *batch[:-1]]))
    assert sorted(partners([1, 2, 3], 30, [7, 7, 7])) == [(1, 3), (2, 1), (3, 2)]
    assert partners([3], 4, [1]) == [(3, 0)]


def test_prompts_are_told_apart():
    rows = rows_of(GROUPS, prompts=20)
    found = prompts_of(dataset_of(GROUPS, rows)).tolist()
    truth = {tuple(row["prompt_ids"]): number for row, number in zip(rows, found)}
    assert [truth[tuple(row["prompt_ids"])] for row in rows] == found
    assert len(set(found)) == len(truth) == 20
