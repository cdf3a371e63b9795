"""Pairs tokenised while they are trained on: which they are, resume, and what is refused."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from dpo_fast.data.config import DataConfig
from dpo_fast.data.dataset import load_examples
from dpo_fast.data.stream import ExampleStream
from dpo_fast.errors import UserError
from tests.support import ranks
from tests.support.metrics import series
from tests.support.models import run_tree, write_model, write_pairs
from tests.support.tokenizers import byte_tokenizer

IDS = ("prompt_ids", "chosen_ids", "rejected_ids")


def pair(index, **more):
    return {"prompt": f"Q{index}", "chosen": f"yes {index}", "rejected": f"no {index}", **more}


@pytest.fixture
def stream(tmp_path):
    """stream(rows, **options): a stream over a file of these rows (dicts, or lines of text)."""

    def run(rows=None, **options) -> ExampleStream:
        path = tmp_path / "pairs.jsonl"
        if rows is not None:
            lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
            path.write_text("".join(f"{line}\n" for line in lines))
        defaults = {"train": str(path), "streaming": True, "stream_buffer": 4}
        return ExampleStream(DataConfig(**(defaults | options)), byte_tokenizer(bos=True))

    return run


def ids(pairs) -> list[tuple]:
    return [tuple(tuple(pairs[index][name]) for name in IDS) for index in range(len(pairs))]


def test_one_pass_is_the_stored_data_set(stream, tmp_path):
    """Short rows, long ones that are cut, ones that are dropped and bad ones."""
    rows = [pair(index) for index in range(5)]
    rows += [pair("x" * 60), pair(5, chosen=" "), "{broken", pair(6, chosen="<s>b"), pair(7)]
    options = {"max_length": 40, "on_bad_row": "skip"}
    flow = stream(rows, **options)
    config = DataConfig(
        train=str(tmp_path / "pairs.jsonl"), cache_dir=str(tmp_path / "cache"), **options
    )
    stored = load_examples(config, byte_tokenizer(bos=True), split="train")
    chunks = [flow.read(), flow.read()]
    assert [(chunk.number, chunk.row, len(chunk)) for chunk in chunks] == [(0, 0, 4), (1, 4, 3)]
    assert [pair for chunk in chunks for pair in ids(chunk)] == ids(stored)
    places = [chunk.where(index) for chunk in chunks for index in range(len(chunk))]
    assert places == [stored.where(index) for index in range(len(stored))]
    for name, lengths in stored.lengths.columns().items():
        found = [n for chunk in chunks for n in chunk.lengths.columns()[name].tolist()]
        assert found == lengths.tolist()
    first, last = chunks[0].report, chunks[1].report
    assert (first.rows_read, first.examples_kept, first.lengths["prompt"]["max"]) == (4, 4, 3)
    same = ("rows_read", "examples_kept", "prompts_cut", "answers_cut", "bos_added", "eos_added")
    for name in same:
        assert getattr(last, name) == getattr(stored.report, name), name
    assert last.bad.counts == stored.report.bad.counts
    assert dict(last.bad.rows) == dict(stored.report.bad.rows)


def test_it_begins_again(stream):
    flow = stream([pair(index) for index in range(6)])
    chunks = [flow.read() for _ in range(5)]
    assert [(chunk.number, chunk.row, len(chunk)) for chunk in chunks] == [
        (0, 0, 4), (1, 4, 2), (2, 0, 4), (3, 4, 2), (4, 0, 4),
    ]  # fmt: skip
    assert ids(chunks[2]) == ids(chunks[0])


@pytest.mark.parametrize("count", [4, 8])
def test_a_pass_that_ends_with_a_chunk(stream, count):
    flow = stream([pair(index) for index in range(count)])
    assert {len(flow.read()) for _ in range(5)} == {4}


def test_nothing_is_tokenised_on_the_way_to_a_position(stream, monkeypatch):
    rows = [pair(0), "{broken", *(pair(index) for index in range(1, 11)), pair(11, chosen=" ")]
    options = {"on_bad_row": "skip", "max_rows": 12}
    flow = stream(rows, **options)
    whole = [flow.read() for _ in range(5)]
    seen = []
    for chunk in whole:
        again = stream(**options)
        (tokenise,) = again._tokenisers

        def counted(row, tokenise=tokenise):
            seen.append(row.where)
            return tokenise(row)

        again._tokenisers = [counted]
        again.seek(chunk.number, chunk.row)
        found = again.read()
        assert (found.number, found.row, ids(found)) == (chunk.number, chunk.row, ids(chunk))
        assert seen == found.places
        seen.clear()


def test_max_rows_counts_broken_ones(stream, tmp_path):
    rows = ["{broken", *(pair(index) for index in range(5))]
    options = {"on_bad_row": "skip", "max_rows": 3}
    assert len(stream(rows, **options).read()) == 2
    config = DataConfig(train=str(tmp_path / "pairs.jsonl"), cache_dir=str(tmp_path), **options)
    assert len(load_examples(config, byte_tokenizer(bos=True), split="train")) == 2


BAD = {
    "broken JSON": ("{broken", "pairs.jsonl:2: broken JSON"),
    "empty prompt": (pair(1, prompt=" "), "pairs.jsonl:2: empty prompt"),
    "BOS": (pair(1, chosen="<s>b"), "pairs.jsonl:2: BOS inside chosen"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_row_is_told_as_without_streaming(stream, tmp_path, what):
    row, message = BAD[what]
    with pytest.raises(UserError) as streamed:
        stream([pair(0), row]).read()
    config = DataConfig(train=str(tmp_path / "pairs.jsonl"), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(UserError) as stored:
        load_examples(config, byte_tokenizer(bos=True), split="train")
    assert str(streamed.value) == str(stored.value)
    assert message in str(streamed.value)


def test_no_usable_pair_is_told_not_sought_for_ever(stream):
    with pytest.raises(UserError, match="none of 2 rows is usable. 2 x empty chosen"):
        stream([pair(0, chosen=" ")] * 2, on_bad_row="skip").read()


def test_columns_are_seen(stream):
    chunk = stream([pair(0, margin=0.1), pair(1, margin=0.5)]).read()
    assert chunk.numbers == ["margin"]
    assert chunk[1]["margin"] == 0.5
    with pytest.raises(
        UserError, match="pairs.jsonl:2: a 'margin', which rows before it do not have"
    ):
        stream([pair(0), pair(1, margin=0.5)]).read()


def test_the_key_follows_content_and_options(stream):
    rows = [pair(0), pair(1)]
    key = stream(rows).key
    assert stream(rows, stream_buffer=7).key == key
    assert stream(rows, max_length=30).key != key
    assert stream([pair(0), pair(2)]).key != key


def test_the_next_chunk_is_read_ahead_and_its_error_comes_when_it_is_due(stream):
    from dpo_fast.data.sampler import Sampler
    from dpo_fast.training.splits import Split, StreamSplit

    def make(chunk, accumulation) -> Split:
        return Split("train", chunk, Sampler(len(chunk), 2, 2), "packed", 0)

    flow = stream([*(pair(index) for index in range(10)), pair(10, prompt=" ")])
    split = StreamSplit(flow, make, last=100)
    assert [split.at(step)[1] for step in range(4)] == [0, 1, 0, 1]
    assert split.examples.number == 1
    split.coming.exception()  # waits for the third chunk
    assert split.at(3)[1] == 1
    with pytest.raises(UserError, match="pairs.jsonl:11: empty prompt"):
        split.at(4)
    flow = stream()
    split = StreamSplit(flow, make, last=4)
    for step in range(4):
        split.at(step)
    assert split.coming is None, "a chunk is read that no step will use"


def test_a_resumed_run_goes_to_its_position(stream, monkeypatch, tmp_path):
    """It seeks. Tokenising all pairs before would give the same pairs, and take as long as the run did."""
    from dpo_fast.data.sampler import Sampler
    from dpo_fast.training import resume
    from dpo_fast.training.config import build_config
    from dpo_fast.training.splits import Split, StreamSplit

    used = []

    def make(chunk, accumulation) -> Split:
        used.append(chunk.number)
        return Split("train", chunk, Sampler(len(chunk), 2, 2, shuffle=False), "packed", 0)

    old = StreamSplit(stream([pair(index) for index in range(19)]), make, last=9)
    for step in range(8):
        part, index = old.at(step)
    places = [part.examples.where(row) for row in part.sampler.global_batch(index)]
    state = {"step": 7, **old.position(7)}
    used.clear()
    new = StreamSplit(stream(), make, last=9)
    config = build_config(run_tree(tmp_path), "tree")
    engine = SimpleNamespace(zero_optimization_stage=lambda: 0)
    parts = {"engine": engine, "train": new, "stateful": {}, "weights": {}}
    run = SimpleNamespace(config=config, total_steps=9, **parts)
    (tmp_path / "state.json").write_text(json.dumps(state))
    monkeypatch.setattr(resume, "load_checkpoint", lambda *_: state)
    assert resume.restore(run, tmp_path, SimpleNamespace(values={})) == state
    part, index = new.at(7)
    assert [part.examples.where(row) for row in part.sampler.global_batch(index)] == places
    assert used == [0, 3]


OPTIONS = {  # sections that are set, and what the message must say
    "no steps": ({"train": {"max_steps": None}}, "set train.max_steps"),
    "cached reference": ({"reference": {"provider": "cached"}}, "choose frozen, or adapter_off"),
    "default reference": ({"reference": {}}, "reference.provider=cached"),
    "held out": ({"data": {"eval_rows": 4}}, "data.eval_rows=4 cannot be held out of a stream"),
    "workers": ({"data": {"workers": 2}}, "data.workers=2 is not used"),
    "no buffer": ({"data": {"stream_buffer": 0}}, "data.stream_buffer=0 must be at least 1"),
    "small buffer": (
        {"data": {"stream_buffer": 7}},
        "less than one step, train.global_batch_size=8",
    ),
    "not streaming": (
        {"data": {"streaming": False, "stream_buffer": 50}},
        "data.stream_buffer=50 is not used",
    ),
    "budget": (
        {"train": {"micro_batch_size": None, "tokens_per_batch": 253}},
        "set it to 254 or more",
    ),
}


def streaming_tree(folder: Path, **sections) -> dict:
    tree = run_tree(folder, max_steps=8)
    tree["data"] |= {"streaming": True, "stream_buffer": 50}
    tree["reference"] = {"provider": "frozen"}
    for section, options in sections.items():
        tree[section] = tree.get(section, {}) | options if options else {}
    return tree


@pytest.mark.parametrize("what", OPTIONS)
def test_what_a_stream_cannot_do_is_refused(tmp_path, what):
    from dpo_fast.training.config import build_config

    build_config(streaming_tree(tmp_path), "tree")
    sections, message = OPTIONS[what]
    with pytest.raises(UserError, match=message):
        build_config(streaming_tree(tmp_path, **sections), "tree")


# Training


STEPS = 8
RESUMED = (("small", 2), ("small", 3), ("small", 7), ("tokens", 7))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs of one rank, some of them resumed, and one of two ranks."""
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("stream")
    write_model(folder / "model")
    write_pairs(folder / "pairs.jsonl", 21)

    def tree(name: str, data: dict, **train) -> dict:
        base = streaming_tree(folder, data=data, parallel={"zero_stage": 1})
        base["train"] |= {
            "output_dir": str(folder / name),
            "global_batch_size": 4,
            "micro_batch_size": 2,
        }
        base["train"] |= {"max_steps": STEPS, "seed": 3} | train
        return base

    # A chunk of 9 pairs is steps of 4, 4 and 1; one of 3 ends each pass of 7 steps.
    small, whole = {"stream_buffer": 9}, {"stream_buffer": 40}
    tokens = {"micro_batch_size": None, "tokens_per_batch": 254, "layout": "packed"}
    cases = [
        tree("small", small, save_steps=1, save_total_limit=20),
        tree("tokens", small, save_steps=7, **tokens),
        tree("even", {"stream_buffer": 15}, **tokens | {"global_batch_size": 6}),
        tree("whole", whole),
        tree("stored", {"streaming": False, "stream_buffer": 10_000}),
        tree("whole-tokens", whole, **tokens),
        tree("stored-tokens", {"streaming": False, "stream_buffer": 10_000}, **tokens),
    ]
    resumed = []
    for case, step in RESUMED:  # within a chunk, between two, in the second pass
        tree = next(tree for tree in cases if tree["train"]["output_dir"].endswith(case))
        train = {
            "output_dir": str(folder / f"{case}-from-{step}"),
            "resume_from_checkpoint": str(folder / case / f"checkpoint-{step}"),
            "save_steps": None,
        }
        resumed.append(tree | {"train": tree["train"] | train})
    two = cases[0] | {"parallel": {"zero_stage": 3}}
    two["train"] = two["train"] | {"output_dir": str(folder / "two"), "save_steps": None}
    even = cases[2] | {"parallel": {"zero_stage": 3}}
    even["train"] = even["train"] | {"output_dir": str(folder / "even-two")}
    for count, trees in ((1, cases), (1, resumed), (2, [two, even])):
        ranks.train(trees, count)
    return folder


def same_weights(a: Path, b: Path) -> bool:
    first, second = (load_file(folder / "final" / "model.safetensors") for folder in (a, b))
    return all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.processes
@pytest.mark.parametrize("kind", ["", "-tokens"])
def test_a_buffer_for_everything_is_a_run_without_streaming(folder, kind):
    """Bit for bit, over the end of the first pass too."""
    whole, stored = folder / f"whole{kind}", folder / f"stored{kind}"
    assert max(series(stored, "epoch").values()) > 1
    for name in ("loss", "grad_norm", "num_tokens"):
        assert len(series(whole, name)) == STEPS
        assert series(whole, name) == series(stored, name), name
    assert same_weights(whole, stored)


@pytest.mark.processes
def test_chunks_are_shuffled_and_trained_on_in_turn(folder):
    """Each step is named by its tokens: a pass has all of them, and the next in another order."""
    assert series(folder / "small")[STEPS] < 0.9 * series(folder / "small")[1], (
        "nothing was learned"
    )
    tokens = series(folder / "small", "num_tokens")
    passes = series(folder / "stored", "num_tokens")
    assert sum(tokens[step] for step in range(1, 8)) == sum(passes[step] for step in range(1, 7))
    assert tokens[1] != tokens[8]
    state = json.loads((folder / "small" / "checkpoint-8" / "state.json").read_text())
    assert state["stream"] == {"chunk": 3, "row": 0, "step": 1}
    assert not list((folder / "small").glob("reference"))
    report = json.loads((folder / "small" / "data-report.json").read_text())
    assert report["examples_kept"] == 9


@pytest.mark.processes
@pytest.mark.parametrize(("kind", "step"), RESUMED)
def test_resume_is_bitwise(folder, kind, step):
    resumed = folder / f"{kind}-from-{step}"
    assert sorted(series(resumed)) == list(range(step + 1, STEPS + 1))
    for name in ("loss", "grad_norm", "num_tokens"):
        before, after = series(folder / kind, name), series(resumed, name)
        assert all(before[step] == after[step] for step in after), name
    assert same_weights(folder / kind, resumed)


@pytest.mark.processes
@pytest.mark.parametrize("run", [("small", "two"), ("even", "even-two")], ids=["pairs", "tokens"])
def test_two_ranks_read_the_same_stream(folder, run):
    """In micro-batches by tokens too, where both runs have as many of them in a step."""
    one, two = (folder / name for name in run)
    assert series(two) == pytest.approx(series(one), abs=1e-6)
    assert series(two, "num_tokens") == series(one, "num_tokens")
    assert len(set(series(one, "num_tokens").values())) > 2, "all steps are alike"


@pytest.mark.processes
def test_a_checkpoint_knows_its_source(folder):
    from dpo_fast.models import load_tokenizer
    from dpo_fast.training.config import build_config
    from dpo_fast.training.load_data import stream_split
    from dpo_fast.training.resume import must_fit

    state = json.loads((folder / "small" / "checkpoint-2" / "state.json").read_text())

    def fits(**data) -> dict:
        tree = streaming_tree(folder, data={"stream_buffer": 9} | data)
        tree["train"] |= {"global_batch_size": 4, "max_steps": STEPS, "seed": 3}
        tree["parallel"] = {"zero_stage": 1}
        config = build_config(tree, "tree")
        train = stream_split(config, load_tokenizer(config.model))
        return must_fit(SimpleNamespace(config=config, train=train, total_steps=STEPS, weights={}))

    assert fits().items() <= state.items()
    other = write_pairs(folder / "other.jsonl", 21, seed=9)
    for change in ({"train": str(other)}, {"stream_buffer": 10}, {"max_length": 90}):
        assert not fits(**change).items() <= state.items(), change


def test_arguments_of_the_template_without_a_chat(stream):
    """It is known at the end of the first whole pass; a run that goes on in mid-pass waits for one."""
    options = {"chat_template_kwargs": {"enable_thinking": False}}
    flow = stream([pair(index) for index in range(6)], **options)
    flow.read()
    with pytest.raises(UserError, match="chat_template_kwargs={'enable_thinking': False} is not"):
        flow.read()
    flow = stream(**options)
    flow.seek(1, 4)
    assert len(flow.read()) == 2
    flow.read()
    with pytest.raises(UserError, match="is not used: all rows are text"):
        flow.read()
