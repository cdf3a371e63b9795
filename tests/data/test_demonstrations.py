"""Answers to learn: from rows without a label, and from rows of the other kinds, to batches."""

import json

import datasets
import pytest

from dpo_fast.data.batch import collate
from dpo_fast.data.config import DataConfig
from dpo_fast.data.dataset import DemonstrationDataset, load_examples
from dpo_fast.data.kinds import DEMONSTRATIONS
from dpo_fast.data.layouts import LAYOUTS
from dpo_fast.data.report import render_examples, render_report
from dpo_fast.data.rows import DemonstrationRow, PairRow, parse_row
from dpo_fast.data.stream import ExampleStream
from dpo_fast.data.verdicts import BadRow, Dropped
from dpo_fast.errors import UserError
from tests.support.forms import BEFORE, SYSTEM, A, B, U, say
from tests.support.tokenizers import BOS, EOS, byte_tokenizer, chat_tokenizer, ids_of

datasets.disable_progress_bars()
TEXT = {"prompt": "2 + 2? ", "completion": "4"}


def parse(raw, **options):
    return parse_row("f.jsonl:7", raw, DataConfig(train="f.jsonl", **options))


def learnt(raw, **options):
    """Prompt and answer of a row."""
    row = parse(raw, **options)
    assert isinstance(row, DemonstrationRow)
    return row.prompt, row.completion


@pytest.fixture
def load(tmp_path):
    def run(rows, tokenizer=None, make=load_examples, **options):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(each) + "\n" for each in rows))
        config = DataConfig(train=str(path), cache_dir=str(tmp_path / "cache"), **options)
        tokenizer = tokenizer or byte_tokenizer(bos=True)
        if make is ExampleStream:
            return ExampleStream(config, tokenizer)
        return make(config, tokenizer, split="train")

    return run


# Rows


def test_a_completion_without_a_label_is_one():
    assert parse(TEXT | {"weight": 2}) == DemonstrationRow(
        "f.jsonl:7", "2 + 2? ", "4", {"weight": 2.0}
    )
    assert learnt({"prompt": "why so?", "completion": [A]}) == ([U], [A])
    assert learnt({"prompt": [U], "completion": "because"}) == ([U], [A])
    assert learnt({"prompt": [U], "completion": [U, A]}) == ([U], [A])
    assert learnt({"prompt": "why so?", "completion": [SYSTEM, U, A]}) == ([SYSTEM, U], [A])
    assert learnt(TEXT, apply_chat_template=True) == (
        [say("user", "2 + 2? ")],
        [say("assistant", "4")],
    )
    assert parse(TEXT | {"finish_reason": "length"}).unfinished == [True]


def test_every_turn_of_a_conversation_is_part_of_the_answer():
    """The prompt ends before the assistant's first turn; data.scored says what of the rest is scored."""
    turns = [SYSTEM, *BEFORE, U, A]
    assert learnt({"messages": turns}) == (turns[:2], turns[2:])
    assert learnt({"completion": turns}) == (turns[:2], turns[2:])
    assert learnt({"messages": [A]}) == ([], [A])


def test_a_marker_ends_the_prompt_of_a_text():
    text, split = "### Q: why ### A: so", ("### Q: why ### A:", " so")
    assert learnt({"text": text}) == ("", text)
    assert learnt({"text": text}, prompt_end="### A:") == split
    assert learnt({"completion": text}, prompt_end="### A:") == split
    with pytest.raises(BadRow, match="no prompt marker"):
        parse({"text": "none"}, prompt_end="### A:")


def test_what_is_wrong_is_named():
    for raw, message in (
        ({"prompt": "a", "response": "b"}, "missing field 'completion'.*did you mean 'response'"),
        ({"completion": "b"}, "missing field 'prompt'"),
        ({"prompt": "other", "completion": [SYSTEM, U, A]}, "does not begin with the prompt"),
        ({"messages": [U, B], "system": "x", "audios": ["y"]}, "column 'audios' is not used"),
        ({"instruction": "q", "context": "some words", "output": "a"}, "'context' is not used"),
        (TEXT | {"tools": [{}]}, "tools without messages"),
    ):
        with pytest.raises(BadRow, match=message):
            parse(raw)
    with pytest.raises(Dropped, match="empty completion"):
        parse({"messages": [U, say("assistant", " ")]})


# data.format=sft: rows of the other kinds


def test_the_best_answer_of_any_row_is_learnt():
    binarized = {"prompt": "why so?", "chosen": [U, A], "rejected": [U, B], "messages": [U, A]}
    assert isinstance(parse(binarized), PairRow)
    assert learnt(binarized, format="sft") == ([U], [A])
    # A rejected answer that no pair could have does not matter.
    for rejected in ([U, A], [U, say("assistant", "")], None, "x"):
        assert learnt(binarized | {"rejected": rejected}, format="sft") == ([U], [A])
    assert learnt({"chosen": "it is a", "rejected": "it is b"}, format="sft") == ("it is", " a")
    group = {
        "prompt": "q",
        "completions": ["a", "b", "c"],
        "finish_reasons": [None, "length", None],
    }
    row = parse(group | {"scores": [1, 3, 3]}, format="sft")
    assert (row.completion, row.unfinished) == ("b", [True])
    row = parse(group | {"ranks": [3, 2, 1]}, format="sft")
    assert (row.completion, row.unfinished) == ("c", [False])
    assert learnt({"prompt": "q", "completions": ["a"], "scores": [1]}, format="sft") == ("q", "a")
    assert learnt(TEXT | {"label": True}, format="sft") == ("2 + 2? ", "4")
    assert learnt({"messages": [U, A]}, format="sft") == ([U], [A])


def test_columns_of_preferences_are_left_behind():
    pair = {"prompt": "q", "chosen": "a", "rejected": "b", "margin": 1.0, "soft_label": 0.9}
    assert parse(pair | {"weight": 3}, format="sft").optional == {"weight": 3.0}
    cut = {"chosen_finish_reason": "length", "rejected_finish_reason": "stop"}
    assert parse(pair | cut, format="sft").unfinished == [True]
    assert parse(pair | cut | {"rejected": "a"}, format="sft").unfinished == [True]
    assert parse(pair | {"rejected_finish_reason": "length"}, format="sft").unfinished == [False]


def test_a_row_without_a_good_answer_is_dropped_or_refused():
    with pytest.raises(
        Dropped, match="undesirable: data.format=sft learns completions whose label"
    ):
        parse(TEXT | {"label": False}, format="sft")
    with pytest.raises(Dropped, match="no answer: completions is an empty list"):
        parse({"prompt": "q", "completions": [], "scores": []}, format="sft")
    with pytest.raises(Dropped, match="empty completion"):
        parse({"prompt": "q", "chosen": " ", "rejected": "b"}, format="sft")
    with pytest.raises(BadRow, match="scores and completions differ in number: 1 and 2"):
        parse({"prompt": "q", "completions": ["a", "b"], "scores": [1]}, format="sft")
    with pytest.raises(ValueError, match="data.group_pairs=best_worst makes pairs.*format=sft"):
        DataConfig(train="f", format="sft", group_pairs="best_worst")


# Data sets


def test_what_is_stored(load):
    tokenizer = byte_tokenizer(bos=True)
    data = load([TEXT, {"prompt": "3? ", "completion": "no"}])
    assert isinstance(data, DemonstrationDataset)
    assert data[0] == {
        "prompt_ids": [BOS, *ids_of(tokenizer, "2 + 2? ")],
        "completion_ids": [*ids_of(tokenizer, "4"), EOS],
    }
    assert (data.kind, data.numbers, data.report.kept) == (
        DEMONSTRATIONS,
        [],
        "2 demonstrations kept",
    )
    assert list(data.report.lengths) == ["prompt", "completion", "total"]
    labelled = load([TEXT | {"label": True}, {"prompt": "3? ", "completion": "no", "label": False}])
    assert labelled.kind != DEMONSTRATIONS and labelled.digests == data.digests


def test_the_same_ids_as_the_chosen_answer_of_a_pair(load):
    rows = [{"prompt": f"Q{n} ", "chosen": f"{n} yes", "rejected": "no"} for n in range(5)]
    pairs, one = load(rows), load(rows, format="sft")
    assert [each["completion_ids"] for each in one] == [each["chosen_ids"] for each in pairs]
    assert [each["prompt_ids"] for each in one] == [each["prompt_ids"] for each in pairs]


def test_a_text_without_prompt_or_bos_is_predicted_from_its_first_token(load):
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = None
    (example,) = load([{"text": "abc"}], tokenizer)
    assert example["prompt_ids"] == ids_of(tokenizer, "a")
    assert example["completion_ids"] == [*ids_of(tokenizer, "bc"), EOS]
    (example,) = load([{"text": "abc"}])
    assert example["prompt_ids"] == [BOS]
    (example,) = load([{"text": "a"}], tokenizer)
    assert example["completion_ids"] == [EOS]
    with pytest.raises(UserError, match="no BOS to predict the first token from"):
        load([{"prompt": "", "completion": "abc", "label": True}], tokenizer)


def test_a_text_that_brings_its_bos_has_one(load):
    (one,), (other,) = load([{"text": "<s>abc"}]), load([{"text": "abc"}])
    assert one["prompt_ids"] == [BOS] and one == other


def test_only_what_the_assistant_says_is_scored(load):
    tokenizer = chat_tokenizer()
    rows = [{"messages": [*BEFORE, U, A]}]
    (every,), (last,) = load(rows, tokenizer), load(rows, tokenizer, scored="last")
    scored = [i for i, flag in zip(every["completion_ids"], every["completion_scored"]) if flag]
    end = tokenizer.eos_token_id
    assert scored == [*ids_of(tokenizer, "hi there"), end, *ids_of(tokenizer, "because"), end]
    assert sum(last["completion_scored"]) == len("because") + 1


def test_kinds_do_not_mix_unless_all_are_to_be_learnt(load):
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    with pytest.raises(UserError, match="jsonl:2 is a pair and .*is a demonstration.*format=sft"):
        load([TEXT, pair])
    with pytest.raises(UserError, match="jsonl:2 is a completion with a label and .*demonstration"):
        load([TEXT, TEXT | {"label": True}], make=ExampleStream).read()
    mixed = [TEXT, pair, TEXT | {"label": False}, {"prompt": "r", "completion": "c", "label": True}]
    data = load(mixed, format="sft")
    assert (len(data), data.report.dropped.counts) == (3, {"undesirable": 1})


def test_a_stream_reads_the_same(load):
    rows = [{"prompt": f"Q{n} ", "completion": f"answer {n}", "weight": 1.0} for n in range(5)]
    stored = load(rows)
    chunk = load(rows, make=ExampleStream, streaming=True, stream_buffer=5).read()
    assert chunk.kind == DEMONSTRATIONS and chunk.numbers == ["weight"]
    assert [chunk[n] for n in range(5)] == [stored[n] for n in range(5)]


def test_the_preview_shows_what_is_learnt(load):
    from rich.console import Console

    data, console = load([TEXT]), Console(record=True, width=100)
    render_report(data.report, console)
    render_examples(data, byte_tokenizer(bos=True), console)
    text = console.export_text()
    assert "1 rows read, 1 demonstrations kept, 0 bad, 0 dropped" in text
    assert "demonstration 0 " in text and "answer ⟦4·" in " ".join(text.split())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_batch_of_them_is_as_one_of_desirable_completions(layout):
    rows = [
        {"prompt_ids": [1, 2], "completion_ids": [4, 5]},
        {"prompt_ids": [1], "completion_ids": [6], "completion_scored": None},
    ]
    batch = collate(rows, layout, kind=DEMONSTRATIONS)
    assert (batch.targets_T.tolist(), batch.lengths_S.tolist()) == ([4, 5, 6], [2, 1])
    assert batch.desirable_S.tolist() == [True, True]
