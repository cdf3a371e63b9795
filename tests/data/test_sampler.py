"""Micro-batches filled to a number of tokens: whole items, each once an epoch, and the same training."""

import gzip
import json
import tracemalloc
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from dpo_fast.data.batch import collate
from dpo_fast.data.kinds import PAIRS, ExampleLengths
from dpo_fast.data.layouts import LAYOUTS
from dpo_fast.data.packing import AHEAD, WINDOW, Costs
from dpo_fast.data.sampler import Sampler, TokenSampler
from tests.support import ranks
from tests.support.metrics import series
from tests.support.models import changed, run_tree, write_model, write_pairs
from tests.support.paths import ROOT

HH = ROOT.parent / "shared" / "data" / "hh_harmless_1500.jsonl.gz"


@st.composite
def costs_and_budget(draw):
    """Items whose sizes add up, or that are padded (with any number of sequences), and a budget."""
    sizes = np.array(draw(st.lists(st.integers(1, 40), min_size=1, max_size=60)))
    sequences = None
    if draw(st.booleans()):
        number = st.integers(1, 4)
        sequences = np.array(draw(st.lists(number, min_size=len(sizes), max_size=len(sizes))))
    costs = Costs(sizes, sequences)
    return costs, draw(st.integers(int(costs.alone_P.max()), 400))


@given(costs_and_budget(), st.integers(1, 20), st.integers(1, 4), st.integers(0, 3))
@settings(max_examples=150, deadline=None)
def test_every_epoch_has_every_item_once_within_the_budget(case, pairs, world, seed):
    costs, budget = case
    sampler = TokenSampler(costs, budget, pairs, world, seed)
    epochs = [range(sampler.steps(1)), range(sampler.steps(1), sampler.steps(2))]
    for epoch in epochs:
        rows = []
        for step in epoch:
            shares = [sampler.micro_batches(step, rank) for rank in range(world)]
            assert {len(share) for share in shares} == {sampler.accumulation}
            batches = [batch for share in shares for batch in share if batch]
            assert batches, "a step without anything in it"
            assert all(costs.of(batch) <= budget for batch in batches)
            together = [row for batch in batches for row in batch]
            assert sorted(together) == sorted(sampler.global_batch(step))
            rows += together
        assert sorted(rows) == list(range(len(costs.sizes_P)))
    assert 0 < sampler.fill <= 1


def some_costs(count: int = 300) -> Costs:
    return Costs(np.random.default_rng(0).integers(5, 90, count))


def test_a_step_is_the_same_on_any_number_of_ranks():
    samplers = {world: TokenSampler(some_costs(), 256, 20, world, seed=3) for world in (1, 2, 4)}
    assert {world: s.accumulation for world, s in samplers.items()} == {1: 4, 2: 2, 4: 1}
    for step in range(2 * samplers[1].steps_per_epoch):
        steps = [sorted(sampler.global_batch(step)) for sampler in samplers.values()]
        assert steps[0] == steps[1] == steps[2]


def test_what_is_left_out_moves_no_other_example():
    left_out = frozenset((3, 17, 20))
    costs = Costs(np.arange(1, 31))
    pairs = (
        (Sampler(30, 8, 2, 2, seed=1), Sampler(30, 8, 2, 2, seed=1, left_out=left_out)),
        (TokenSampler(costs, 60, 8, 2), TokenSampler(costs, 60, 8, 2, left_out=left_out)),
    )
    for whole, some in pairs:
        assert some.steps_per_epoch == whole.steps_per_epoch
        assert some.accumulation == whole.accumulation
        for step in range(2 * whole.steps_per_epoch):
            expected = [index for index in whole.global_batch(step) if index not in left_out]
            assert some.global_batch(step) == expected
            batches = [batch for rank in range(2) for batch in some.micro_batches(step, rank)]
            assert sorted(sum(batches, [])) == sorted(expected)
            assert len(batches) == 2 * whole.accumulation


def test_seed_and_epoch_alone_decide():
    def epoch(seed: int, number: int) -> list[list[int]]:
        sampler = TokenSampler(some_costs(), 256, 24, seed=seed)
        first, last = (sampler.steps(number + k) if number + k else 0 for k in (0, 1))
        return [sampler.global_batch(step) for step in range(first, last)]

    assert epoch(1, 0) == epoch(1, 0) != epoch(2, 0)
    assert epoch(1, 1) == epoch(1, 1) != epoch(1, 0)
    later = TokenSampler(some_costs(), 256, 24, seed=1, first_epoch=1)
    assert [later.global_batch(step) for step in range(later.steps_per_epoch)] == epoch(1, 1)


def test_first_epoch_of_the_sampler_that_counts_pairs():
    whole, later = Sampler(21, 8, 2, seed=3), Sampler(21, 8, 2, seed=3, first_epoch=2)
    assert [later.global_batch(s) for s in range(3)] == [whole.global_batch(s) for s in (6, 7, 8)]
    assert (whole.steps(1), whole.steps(2.5), whole.steps(0.01)) == (3, 8, 1)


def test_steps_of_epochs_that_differ():
    """Epochs need not have as many micro-batches; none of their steps is lost or taken twice."""
    sampler = TokenSampler(Costs(np.random.default_rng(2).integers(30, 90, 40)), 100, 1)
    counts = [
        sampler.steps(epoch) - (sampler.steps(epoch - 1) if epoch > 1 else 0)
        for epoch in range(1, 8)
    ]
    assert len(set(counts)) > 1, "every epoch is alike: the test shows nothing"
    assert sampler.steps(2.5) == sum(counts[:2]) + round(counts[2] / 2)


@pytest.mark.parametrize("world", [1, 3])
def test_pairs_of_a_step_are_near_those_asked_for(world):
    per_bin = 300 / len(some_costs().bins(256, range(300)))
    for wanted in (1, 10, 24, 60):
        sampler = TokenSampler(some_costs(), 256, wanted, world)
        bins = sampler.accumulation * world
        nearest = min(range(world, 100, world), key=lambda k: abs(k * per_bin - wanted))
        assert abs(bins * per_bin - wanted) <= abs(nearest * per_bin - wanted) + world
        assert sampler.examples_per_step == pytest.approx(bins * per_bin, rel=0.1)


def test_a_step_is_a_fair_sample():
    """The bulk of a micro-batch follows the order: long and short items come together."""
    bins = some_costs(2000).bins(1024, np.random.default_rng(1).permutation(2000).tolist())
    counts = [len(items) for items in bins[:-1]]
    assert max(counts) < 2 * min(counts)


def test_padded_groups_are_the_fewest():
    """Against every partition into runs of equal or falling length, by dynamic programming."""
    draw = np.random.default_rng(4)
    for _ in range(30):
        sizes, budget = np.sort(draw.integers(1, 30, 25))[::-1], 64
        best = [0] + [99] * 25
        for end, start in product(range(1, 26), range(25)):
            if start < end and 2 * (end - start) * sizes[start] <= budget:
                best[end] = min(best[end], best[start] + 1)
        costs = Costs(sizes, np.full(25, 2))
        assert len(costs.bins(budget, draw.permutation(25).tolist())) == best[25]


def test_what_lies_beyond_the_look_ahead_is_not_lost():
    count = 2 * WINDOW + AHEAD + 7
    sizes = np.random.default_rng(5).integers(1, 300, count)
    for sequences in (None, np.full(count, 2)):
        bins = Costs(sizes, sequences).bins(1000, np.random.default_rng(6).permutation(count))
        assert sorted(item for items in bins for item in items) == list(range(count))


def test_some_of_the_items():
    bins = some_costs().bins(256, range(50, 90))
    assert sorted(item for items in bins for item in items) == list(range(50, 90))


def test_an_item_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="takes 300 tokens, more than 299"):
        TokenSampler(Costs(np.array([5, 300, 7])), 299, 2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_costs_are_what_the_layout_takes(layout):
    draw = np.random.default_rng(7)
    pairs = [
        {
            name: [place] * int(draw.integers(1, 9))
            for name in ("prompt_ids", "chosen_ids", "rejected_ids")
        }
        for place in range(6)
    ]
    costs = LAYOUTS[layout].costs(ExampleLengths.of(pairs, PAIRS))
    for some in ([0], [3], [1, 2, 4], range(6)):
        batch = collate([pairs[index] for index in some], layout)
        assert costs.of(some) == batch.input_ids.numel()
        if len(some) == 1:
            assert costs.alone_P[some[0]] == batch.input_ids.numel()


def test_a_million_examples_stay_in_arrays():
    """Python's lists would take 40 bytes an example, on every rank."""
    tracemalloc.start()
    try:
        Sampler(10**6, 64, 8).global_batch(0)
        assert tracemalloc.get_traced_memory()[1] < 1e6  # torch's array is not counted
        count = 10**5
        sampler = TokenSampler(Costs(np.full(count, 30)), 300, 64)
        assert len(sampler.global_batch(5)) == 60
        assert tracemalloc.get_traced_memory()[0] < 20 * count  # two arrays of 8 bytes
    finally:
        tracemalloc.stop()


# A real data set


@pytest.fixture(scope="module")
def hh_lengths(tmp_path_factory):
    """Lengths of the usable HH pairs in a byte-level BPE of 8,192 tokens, trained on their text."""
    if not HH.exists():
        pytest.skip("the HH sample is not beside the repository")
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from dpo_fast.data.config import DataConfig
    from dpo_fast.data.stream import ExampleStream

    with gzip.open(HH, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=8192, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    texts = (row[side] for row in rows for side in ("chosen", "rejected"))
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    lengths = ExampleStream(DataConfig(train=str(HH), on_bad_row="skip"), fast).read().lengths
    assert len(lengths) > 1400
    return lengths


@pytest.mark.parametrize("layout", ["shared_prefix", "packed"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_micro_batches_of_the_hh_sample_are_full(hh_lengths, layout, seed):
    sampler = TokenSampler(LAYOUTS[layout].costs(hh_lengths), 4096, 64, 2, seed)
    assert sampler.fill > 0.97
    assert sampler.examples_per_step == pytest.approx(64, rel=0.3)


def test_padded_micro_batches_of_the_hh_sample_are_as_full_as_they_can_be(hh_lengths):
    """Equal rows waste what is left over when their number is whole: a tenth, of the longest half."""
    costs = LAYOUTS["padded"].costs(hh_lengths)
    sampler = TokenSampler(costs, 4096, 64, 2)
    assert sampler.fill > 0.92
    alone = Sampler(len(costs.sizes_P), 22, 11)  # as many pairs each as the sampler has on average
    widest = [costs.sizes_P[alone.micro_batches(step, 0)[0]].max() for step in range(60)]
    used = [costs.sizes_P[alone.micro_batches(step, 0)[0]].mean() for step in range(60)]
    assert np.mean(used) / np.mean(widest) < 0.5, (
        "unsorted batches are no worse: this shows nothing"
    )


# Training


STEPS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs of one rank, and one of two ranks."""
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("sampler")
    write_model(folder / "model")
    write_pairs(folder / "pairs.jsonl", 24)
    write_pairs(folder / "eight.jsonl", 8, seed=1)
    base = run_tree(folder, max_steps=STEPS, micro_batch_size=None)
    # 20 pairs are three micro-batches, and two a step: in every other step the second rank has none.
    one = changed(
        base,
        folder / "one",
        parallel={"zero_stage": 1},
        data={"eval_rows": 4},
        train={"tokens_per_batch": 400, "global_batch_size": 14, "save_steps": 3},
    )
    resume = {"resume_from_checkpoint": str(folder / "one" / "checkpoint-3")}
    pairs = changed(
        base,
        folder / "pairs",
        parallel={"zero_stage": 0},
        reference={"provider": "frozen"},
        data={"train": str(folder / "eight.jsonl")},
    )
    cases = [one, changed(one, folder / "resumed", train=resume), pairs]
    for layout in LAYOUTS:
        tokens = {"tokens_per_batch": 300, "layout": layout}
        cases.append(changed(pairs, folder / layout, train=tokens))
    two = changed(one, folder / "two", parallel={"zero_stage": 3})
    ranks.train(cases)
    ranks.train([two], 2)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "final" / "model.safetensors")


def assert_same_run(folder: Path, a: str, b: str, within: float) -> None:
    assert len(series(folder / a)) == STEPS
    assert series(folder / b) == pytest.approx(series(folder / a), abs=within)
    first, second = weights(folder / a), weights(folder / b)
    for name, value in first.items():
        assert (value - second[name]).abs().max() <= within, name


@pytest.mark.processes
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_pairs_in_a_step_train_the_same(folder, layout):
    """All eight pairs in every step, in micro-batches of 4 pairs or of 300 tokens."""
    state = json.loads((folder / layout / f"checkpoint-{STEPS}" / "state.json").read_text())
    assert (state["tokens_per_batch"], state["layout"]) == (300, layout)
    assert series(folder / layout)[STEPS] < 0.99 * series(folder / layout)[1], "nothing was learned"
    assert_same_run(folder, "pairs", layout, 1e-6)


@pytest.mark.processes
def test_two_ranks_with_zero_3_train_as_one(folder):
    assert series(folder / "one", "epoch")[STEPS] == 3, "the steps are not those that were planned"
    assert_same_run(folder, "one", "two", 1e-6)


@pytest.mark.processes
def test_resume_in_an_epoch_is_bitwise(folder):
    assert sorted(series(folder / "resumed")) == [4, 5, 6]
    for name in ("loss", "grad_norm", "learning_rate", "eval_loss", "num_tokens"):
        whole, resumed = series(folder / "one", name), series(folder / "resumed", name)
        assert all(resumed[step] == whole[step] for step in resumed), name
    whole, resumed = weights(folder / "one"), weights(folder / "resumed")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.processes
def test_a_changed_budget_or_layout_is_not_resumed(folder):
    """`must_fit` holds both, so a checkpoint with others is refused."""
    from types import SimpleNamespace

    from dpo_fast.training.config import build_config
    from dpo_fast.training.resume import must_fit

    def fits(**train) -> dict:
        tree = run_tree(folder, micro_batch_size=None, **train)
        split = SimpleNamespace(must_fit=lambda: {"data": "x"}, sampler=None)
        return must_fit(
            SimpleNamespace(
                config=build_config(tree, "tree"), train=split, total_steps=1, weights={}
            )
        )

    assert fits(tokens_per_batch=300) != fits(tokens_per_batch=301)
    assert fits(tokens_per_batch=300, layout="packed") != fits(
        tokens_per_batch=300, layout="padded"
    )
    assert fits(layout="packed") == fits(layout="padded")


def test_a_pair_that_does_not_fit_is_named(tmp_path):
    from dpo_fast.errors import UserError
    from dpo_fast.training.config import build_config
    from dpo_fast.training.load_data import load_split
    from tests.support.tokenizers import byte_tokenizer

    def load(tokens: int):
        tree = run_tree(tmp_path, micro_batch_size=None, tokens_per_batch=tokens, layout="packed")
        return load_split(build_config(tree, "tree"), byte_tokenizer(), "train", shuffle=True)

    write_pairs(tmp_path / "pairs.jsonl", 5)
    alone_P = LAYOUTS["packed"].costs(load(1000).lengths).alone_P
    load(int(alone_P.max()))
    place = int(alone_P.argmax()) + 1
    with pytest.raises(
        UserError, match=rf"tokens_per_batch=40 does not hold .*jsonl:{place}, which"
    ):
        load(40)
