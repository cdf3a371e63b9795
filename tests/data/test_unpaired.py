"""Completions by themselves: from rows with a label to batches, mismatched ones and stored references."""

import json

import datasets
import numpy as np
import pytest
import torch

from dpo_fast.data.batch import collate
from dpo_fast.data.config import DataConfig
from dpo_fast.data.dataset import CompletionDataset, load_examples
from dpo_fast.data.kinds import COMPLETIONS, PAIRS, ExampleLengths
from dpo_fast.data.layouts import LAYOUTS
from dpo_fast.data.mismatched import mismatched, mismatched_lengths, partners
from dpo_fast.data.report import DataReport, render_examples, render_report
from dpo_fast.data.rows import CompletionRow, PairRow, parse_row
from dpo_fast.data.stream import ExampleStream
from dpo_fast.data.verdicts import BadRow, Dropped
from dpo_fast.errors import UserError
from dpo_fast.losses.spec import LOSSES
from dpo_fast.references.artefact import Growing
from dpo_fast.references.cached import open_reference
from dpo_fast.references.compute import length_batches, part_table, score_part
from dpo_fast.references.store import Request, default_place, find_stored, named_place
from tests.support.tokenizers import BOS, EOS, byte_tokenizer, chat_tokenizer, ids_of

datasets.disable_progress_bars()
TEXT = {"prompt": "2 + 2? ", "completion": "4", "label": True}
USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
PAIR = {"prompt": "2 + 2? ", "chosen": "4", "rejected": "5"}


def unused(raw, config):
    """The columns of a row that are passed over."""
    names = set()
    parse_row("f.jsonl:7", raw, config, names)
    return names


def parse(raw, **options):
    return parse_row("f.jsonl:7", raw, DataConfig(train="f.jsonl", **options))


def row(index, **more):
    good = index % 3 > 0
    return {"prompt": f"Q{index // 2} ", "completion": f"answer {index}", "label": good, **more}


@pytest.fixture
def load(tmp_path):
    def run(rows, tokenizer=None, split="train", make=load_examples, **options):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(each) + "\n" for each in rows))
        config = DataConfig(
            **({"train": str(path), "cache_dir": str(tmp_path / "cache")} | options)
        )
        if make is ExampleStream:
            return ExampleStream(config, tokenizer or byte_tokenizer(bos=True))
        return make(config, tokenizer or byte_tokenizer(bos=True), split=split)

    return run


# Rows


def test_the_columns_tell_what_a_row_is():
    assert parse(TEXT) == CompletionRow("f.jsonl:7", "2 + 2? ", "4", True, {})
    assert parse(TEXT | {"weight": 2}, format="unpaired").optional == {"weight": 2.0}
    assert isinstance(parse(PAIR | {"label": 3}), PairRow)
    # Arrow gives every row the columns of all others.
    assert isinstance(parse(TEXT | {"chosen": None, "rejected": None}), CompletionRow)
    renamed = {"q": "2 + 2? ", "a": "4", "thumb": False}
    columns = {"prompt": "q", "completion": "a", "label": "thumb"}
    assert parse(renamed, columns=columns).label is False
    config = DataConfig(train="f")
    assert unused(TEXT | {"id": 1, "weight": 1.0}, config) == {"id"}
    assert unused(PAIR | {"label": True}, config) == {"label"}


@pytest.mark.parametrize(
    "prompt, completion",
    [([USER], [ASSISTANT]), ("hi", [ASSISTANT]), ([USER], "hello"), (USER, ASSISTANT)],
)
def test_prompt_and_completion_may_be_messages(prompt, completion):
    parsed = parse({"prompt": prompt, "completion": completion, "label": False, "tools": [{}]})
    assert (parsed.prompt, parsed.completion, parsed.is_chat) == ([USER], [ASSISTANT], True)
    assert parsed.optional == {"tools": [{}]}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"label": 2}, "field 'label' is not a bool: expected true or false, got 2"),
        ({"label": "true"}, "field 'label' is not a bool: .*got 'true'"),
        ({"label": None}, "field 'label' is not a bool"),
        ({"completion": None}, "field 'completion' has the wrong type.*null"),
        ({"completion": " \n"}, "empty completion"),
        ({"prompt": " "}, "empty prompt"),
        ({"completion": [USER]}, "completion begins with a user message"),
        ({"weight": -1}, "field 'weight' is out of range"),
        ({"reference_completion_logps": 0.5}, "field 'reference_completion_logps' is out of range"),
        ({"tools": [{}]}, "tools without messages"),
    ],
)
def test_bad_rows(changes, message):
    with pytest.raises(Dropped if message == "empty completion" else BadRow, match=message):
        parse(TEXT | changes)


@pytest.mark.parametrize("value", [True, 1, 1.0])
def test_a_label_may_be_a_number(value):
    assert parse(TEXT | {"label": value}).label is True
    assert parse(TEXT | {"label": type(value)(0)}).label is False


def test_what_is_missing_is_named():
    with pytest.raises(BadRow, match="missing field 'label': the row has 'prompt', 'completion'"):
        parse({"prompt": "a", "completion": "b"}, format="unpaired")
    with pytest.raises(BadRow, match="missing field 'completion'.*did you mean 'completions'"):
        parse({"prompt": "a", "completions": "b", "label": True})
    with pytest.raises(BadRow, match="missing field 'prompt'"):
        parse({"completion": "b", "label": True})
    with pytest.raises(BadRow, match="missing field 'completion'"):
        parse(PAIR, format="unpaired")
    with pytest.raises(BadRow, match="missing field 'chosen'"):
        parse(TEXT, format="pairs")


# Data sets


def test_what_is_stored(load):
    tokenizer = byte_tokenizer(bos=True)
    data = load([row(0, weight=2), row(1, weight=0.5), row(2, weight=1, margin=None)])
    assert isinstance(data, CompletionDataset)
    assert (len(data), data.numbers, data.kind) == (3, ["weight"], COMPLETIONS)
    assert data[1] == {
        "prompt_ids": [BOS, *ids_of(tokenizer, "Q0 ")],
        "completion_ids": [*ids_of(tokenizer, "answer 1"), EOS],
        "label": True,
        "weight": 0.5,
    }
    assert data.labels.tolist() == [False, True, True]
    assert data.where(2).endswith("rows.jsonl:3")
    assert {name: v.tolist() for name, v in data.lengths.columns().items()} == {
        "prompt": [4, 4, 4],
        "completion": [9, 9, 9],
    }
    assert (data.report.kind, data.report.examples_kept, data.report.desirable) == (
        "completions",
        3,
        2,
    )
    assert data.report.tokens == {
        "prompt": 12,
        "completion": 27,
        "total": 39,
        "scored": 27,
        "separate": 39,
    }
    assert list(data.report.lengths) == ["prompt", "completion", "total"]
    assert DataReport.from_json(data.report.to_json()) == data.report


def test_chat_is_rendered_and_ends_its_turn(load):
    tokenizer = chat_tokenizer()
    raw = {"prompt": [USER], "completion": "hello", "label": True}
    single = load([raw], tokenizer)[0]
    pair = load([{"prompt": [USER], "chosen": "hello", "rejected": "no"}], tokenizer)[0]
    assert single["prompt_ids"] == pair["prompt_ids"]
    assert single["completion_ids"] == pair["chosen_ids"]


def test_the_label_is_part_of_the_data_but_not_of_a_rows_tokens(load):
    rows = [row(index) for index in range(4)]
    one, other = load(rows), load([rows[0] | {"label": True}, *rows[1:]])
    assert one.digests == other.digests
    assert one.fingerprint != other.fingerprint
    assert load(rows).fingerprint == one.fingerprint
    assert load(rows[:3]).fingerprint != one.fingerprint


def test_it_is_cut_like_a_pair(load):
    long = row(0) | {"prompt": "p" * 30, "completion": "c" * 30}
    data = load([long, row(1)], max_length=20, max_prompt_length=8)
    # 20 - 8 tokens of the answer, and the end of the prompt with BOS still first.
    assert [len(data[0][name]) for name in ("prompt_ids", "completion_ids")] == [8, 12]
    assert data[0]["prompt_ids"][0] == BOS
    assert (data.report.prompts_cut, data.report.answers_cut) == (1, 1)
    assert "1 of 2 answers were cut to fit data.max_length" in data.report.notes()
    with pytest.raises(UserError, match="rows.jsonl:1: 31 prompt and 31 completion tokens do not"):
        load([long, row(1)], max_length=20, truncation="error")
    dropped = load([long, row(1)], max_length=20, truncation="drop")
    assert (len(dropped), dropped.report.dropped.total) == (1, 1)


def test_bad_rows_stop_or_are_counted(load):
    rows = [row(0), row(1) | {"label": "yes"}, row(2)]
    with pytest.raises(UserError, match="rows.jsonl:2: field 'label' is not a bool.*on_bad_row"):
        load(rows)
    data = load(rows, on_bad_row="skip")
    assert (len(data), data.report.bad.counts) == (2, {"field 'label' is not a bool": 1})


def test_pairs_and_completions_do_not_mix(load):
    with pytest.raises(
        UserError, match=r"rows.jsonl:2 is a pair and .*rows.jsonl:1 is a completion"
    ):
        load([row(0), PAIR])
    with pytest.raises(UserError, match="rows.jsonl:2 is a completion with a label and .*a pair"):
        load([PAIR, row(0)], make=ExampleStream).read()
    skipped = load([row(0), PAIR], format="unpaired", on_bad_row="skip")
    assert (len(skipped), skipped.report.bad.total, skipped.kind) == (1, 1, COMPLETIONS)
    skipped = load([row(0), PAIR], format="pairs", on_bad_row="skip")
    assert (len(skipped), skipped.report.bad.total, skipped.kind) == (1, 1, PAIRS)


def test_the_cache_and_workers_and_held_out_rows(load, tmp_path):
    rows = [row(index) for index in range(30)]
    first = load(rows)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    again = load(rows, workers=2)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()} == before
    assert again.fingerprint == first.fingerprint
    held = load(rows, split="eval", eval_rows=4)
    assert isinstance(held, CompletionDataset) and len(held) == 4 == len(held.labels)
    where = [int(held.where(index).rsplit(":", 1)[1]) - 1 for index in range(4)]
    assert held.labels.tolist() == [rows[index]["label"] for index in where]
    assert load(rows, cache_dir=str(tmp_path / "two"), workers=2).fingerprint == first.fingerprint


def test_a_stream_reads_the_same(load):
    rows = [row(index, weight=1.0) for index in range(7)]
    stored = load(rows)
    stream = load(rows, make=ExampleStream, streaming=True, stream_buffer=4)
    chunks = [stream.read(), stream.read()]
    assert [chunk.kind for chunk in chunks] == [COMPLETIONS] * 2
    assert [chunk[i] for chunk in chunks for i in range(len(chunk))] == [
        stored[i] for i in range(7)
    ]
    assert np.concatenate([c.labels for c in chunks]).tolist() == stored.labels.tolist()
    assert chunks[1].report.desirable == stored.report.desirable
    assert chunks[0].lengths.answers_S.tolist() == stored.lengths.answers_S[:4].tolist()
    uneven = load([row(0, weight=1.0), row(1)], make=ExampleStream)
    with pytest.raises(UserError, match="rows.jsonl:2: no 'weight', which rows before it have"):
        uneven.read()


def test_the_preview_shows_good_and_bad(load):
    from rich.console import Console

    data, console = load([row(index) for index in range(3)]), Console(record=True, width=100)
    render_report(data.report, console)
    render_examples(data, byte_tokenizer(bos=True), console, n=2)
    text = console.export_text()
    assert "3 rows read, 3 completions kept (2 desirable, 1 undesirable), 0 bad, 0 dropped" in text
    assert "completion 0 " in text and "undesirable ⟦a·n·" in text and "desirable ⟦a·" in text


# Batches

ROWS = [
    {"prompt_ids": [1, 2, 3], "completion_ids": [4, 5], "label": True, "weight": 1.0},
    {"prompt_ids": [1, 9], "completion_ids": [6], "label": False, "weight": 2.0},
    {"prompt_ids": [1, 2, 3], "completion_ids": [7, 8, 9], "label": True, "weight": 3.0},
]


def lay_out(rows, layout, **options):
    return collate(rows, layout, kind=COMPLETIONS, **options)


def test_completions_of_one_prompt_share_it():
    batch = lay_out(ROWS, "shared_prefix", indices=[30, 10, 20], columns=["weight"])
    assert batch.spans == ((4, 0, -1), (2, 3, 0), (2, 0, -1))
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 7, 8, 1, 9]]
    assert batch.targets_T.tolist() == [4, 5, 6, 7, 8, 9]
    assert batch.rows_T.tolist() == [2, 3, 7, 2, 4, 5]
    # Examples stay in their order.
    assert batch.indices_P.tolist() == [30, 10, 20]
    assert batch.lengths_S.tolist() == [2, 1, 3]
    assert batch.desirable_S.tolist() == [True, False, True]
    assert batch.columns["weight"].tolist() == [1, 2, 3]
    assert (batch.num_examples, batch.tokens) == (3, 14)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_agree_on_what_is_scored(layout):
    batch, truth = lay_out(ROWS, layout, indices=[5, 6, 7]), lay_out(ROWS, "padded")
    for name in ("targets_T", "lengths_S", "desirable_S"):
        assert torch.equal(getattr(batch, name), getattr(truth, name)), name
    assert batch.desirable_S.tolist() == [True, False, True]
    assert batch.indices_P.tolist() == [5, 6, 7]
    ids = batch.input_ids.flatten()[batch.rows_T].tolist()
    assert ids == [3, 4, 9, 3, 7, 8]  # the token before each target
    costs = LAYOUTS[layout].costs(ExampleLengths.of(ROWS, COMPLETIONS))
    assert costs.of([0, 1, 2]) >= batch.input_ids.numel()
    assert costs.of([1]) == lay_out(ROWS[1:2], layout).input_ids.numel()
    empty = lay_out([], layout, columns=["weight"])
    assert (empty.num_examples, empty.desirable_S.shape, empty.desirable_S.dtype) == (
        0,
        (0,),
        torch.bool,
    )
    with pytest.raises(ValueError, match="completion with a label has an empty completion_ids"):
        lay_out([ROWS[0] | {"completion_ids": []}], layout)


# Mismatched completions


def test_every_row_gets_the_completion_of_the_row_before():
    assert partners([7, 3, 5], 9) == [(7, 5), (3, 7), (5, 3)]
    assert partners([7, 3, 7], 9) == [(7, 7), (3, 7), (7, 3)]  # a mixture repeats examples
    assert partners([8], 9) == [(8, 0)]  # alone: the next of the data
    joined = mismatched(ROWS[0], ROWS[2], COMPLETIONS, 5)
    assert (joined["prompt_ids"], joined["completion_ids"]) == ([1, 2, 3], [7, 8])
    pairs = [{"prompt_ids": [n], "chosen_ids": [10 + n], "rejected_ids": [20 + n]} for n in (1, 2)]
    joined = mismatched(*pairs, PAIRS, 9)
    assert joined == {"prompt_ids": [1], "chosen_ids": [12], "rejected_ids": [22]}


def test_mismatched_lengths_are_those_of_the_rows():
    lengths = ExampleLengths.of(ROWS, COMPLETIONS)
    others = partners([2, 0, 1], 3)
    found = mismatched_lengths(lengths, others, 5)
    rows = [mismatched(ROWS[row], ROWS[other], COMPLETIONS, 5) for row, other in others]
    for name, values in found.columns().items():
        assert values.tolist() == [len(each[f"{name}_ids"]) for each in rows]


def test_losses_that_take_completions_are_the_unpaired_ones():
    takers = {spec.name for spec in LOSSES.values() if spec.kind == "completions"}
    assert takers == {"kto", "bco", "apo_zero_unpaired"}


# Stored references


def minus_targets(targets_U, predictions_T, **_):
    """A model whose log-probability of a token is minus its number."""
    return {"logp": -targets_U[predictions_T].float()}


def store(data, folder, per_token=True):
    """As `compute_reference` does, with minus the token's number as its log-probability."""
    request = Request("train", data, "m", "fp32", per_token)
    growing, rows = Growing(folder, request.manifest), range(len(data))
    growing.begin()
    plan = length_batches(rows, LAYOUTS["shared_prefix"].costs(data.lengths), 3)
    batches = [lay_out([data[row] for row in some], "shared_prefix", indices=some) for some in plan]
    values_T = score_part(minus_targets, batches, rows, data.lengths, "cpu")
    growing.add(part_table(values_T, data.lengths, data, rows, per_token))
    growing.close()
    return request


def test_a_stored_reference_of_completions(load, tmp_path):
    import pandas

    data = load([row(index) for index in range(7)])
    folder = tmp_path / "reference" / "train"
    folder.parent.mkdir()
    request = store(data, folder)
    table = pandas.read_parquet(folder)
    assert list(table) == [
        "digest",
        "where",
        "completion_logps",
        "completion_tokens",
        "completion_token_logps",
    ]
    sums = [-float(sum(data[index]["completion_ids"])) for index in range(7)]
    assert table["completion_logps"].tolist() == sums
    assert find_stored(named_place(str(folder), request), request) == [folder]
    reference = open_reference([folder], data.digests, True, "cpu", COMPLETIONS)
    rows = [4, 0, 5]
    batch = lay_out([data[row] for row in rows], "shared_prefix", indices=rows)
    assert batch.indices_P.tolist() == rows
    assert reference(batch).tolist() == [sums[row] for row in rows]
    assert torch.equal(reference.token_logps(batch), -batch.targets_T.float())


def test_pairs_and_completions_do_not_take_each_others_reference(load, tmp_path):
    singles = load([row(index) for index in range(3)])
    folder = tmp_path / "reference" / "train"
    folder.parent.mkdir()
    store(singles, folder)
    pairs = Request("train", load([PAIR]), "m", "fp32")
    assert "kind" not in pairs.manifest  # as it has always been
    with pytest.raises(UserError, match="computed for something else: kind is 'completions'"):
        find_stored(named_place(str(folder), pairs), pairs)
    own = Request("train", singles, "m", "fp32")
    assert default_place("run", pairs).own != default_place("run", own).own
