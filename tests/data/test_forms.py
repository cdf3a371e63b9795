"""Rows as other trainers and data sets have them: the same token ids as the canonical form."""

import json

import pytest

from dpo_fast.data.config import DataConfig
from dpo_fast.data.dataset import load_examples
from dpo_fast.data.entries import FORMATS
from dpo_fast.data.forms.merge import merged
from dpo_fast.data.forms.table import FORMS, NAMES
from dpo_fast.data.rows import parse_row
from dpo_fast.data.stream import ExampleStream
from dpo_fast.data.tokenise import RowTokeniser
from dpo_fast.data.verdicts import BadRow, Dropped
from dpo_fast.errors import UserError
from tests.support.forms import (
    ANSWERS,
    BEFORE,
    CASES,
    KEPT,
    METADATA,
    NEW_BEFORE,
    PAIR,
    RANKED,
    SCORED,
    SHAREGPT,
    SYSTEM,
    THREE,
    A,
    B,
    U,
    say,
    talk,
)
from tests.support.tokenizers import chat_tokenizer

BY_NAME_ALONE = {"hh"}  # by their columns these are texts


def ids(raw, **options):
    config = DataConfig(train="f", **options)
    return RowTokeniser(chat_tokenizer(), config)(parse_row("f:1", raw, config))


@pytest.mark.parametrize("case", CASES)
def test_the_ids_are_those_of_the_canonical_form(case):
    form, raw, canonical = CASES[case]
    expected = ids(canonical)
    assert ids(raw, format=form) == expected
    if form not in BY_NAME_ALONE:
        assert ids(raw | METADATA | raw) == expected


@pytest.mark.parametrize("case", CASES)
def test_values_are_kept_too(case):
    """Labels, scores, weights and tools are those of the canonical form."""
    form, raw, canonical = CASES[case]
    config = DataConfig(train="f", format=form)
    more = {"weight": 2.0}
    if form != "text":  # which no template renders
        more["tools"] = json.dumps([{"name": "f"}])
    got = parse_row("f:1", raw | more, config)
    expected = parse_row("f:1", canonical | more, DataConfig(train="f"))
    assert got == expected and got.optional["weight"] == 2.0
    assert got.optional.get("tools") == (None if form == "text" else [{"name": "f"}])


def test_every_form_has_a_fixture():
    assert {form for form, _, _ in CASES.values()} == {*NAMES, "openrlhf"}
    own = {"pairs", "messages", "unpaired", "groups", "sft"}
    assert set(FORMATS) == {*NAMES, "openrlhf", "auto", *own}
    taken = set()
    for name, raw, _ in CASES.values():
        row = {"label": raw.get("kto_tag"), **raw} | (
            {"chosen": 1, "rejected": 1} if "chosen_response" in raw else {}
        )
        taken |= {form for form in FORMS if form.name == name and not form.missing(row)}
    assert {form for form in FORMS if form.auto} <= taken


@pytest.mark.parametrize("case", CASES)
def test_a_row_of_another_form_is_not_taken_for_the_named_one(case):
    form, raw, _ = CASES[case]
    other = "shp" if form != "shp" else "arena"
    with pytest.raises(BadRow, match=f"not in data.format={other}: the row has no '"):
        ids(raw, format=other)


# Names of LLaMA-Factory and OpenRLHF in data.columns


def test_columns_of_dataset_info():
    raw = {"q": "why", "x": "so?", "good": "because", "bad": "no idea", "sys": "be brief", "h": []}
    columns = {"prompt": "q", "query": "x", "chosen": "good", "rejected": "bad", "system": "sys"}
    expected = ids(PAIR | {"prompt": [SYSTEM, say("user", "why\nso?")]})
    assert ids(raw, columns=columns | {"history": "h"}) == expected
    assert ids(raw, columns=columns, format="alpaca") == expected
    talks = {"talk": SHAREGPT, "good": talk("gpt", "because"), "bad": talk("gpt", "no idea")}
    columns = {"messages": "talk", "chosen": "good", "rejected": "bad"}
    assert ids(talks, columns=columns) == ids(NEW_BEFORE)
    kto = {"talk": [*SHAREGPT, talk("gpt", "because")], "ok": True}
    assert ids(kto, columns={"messages": "talk", "kto_tag": "ok"}) == ids(
        KEPT | {"prompt": [*BEFORE, U]}
    )


@pytest.mark.parametrize("streaming", [False, True])
def test_a_named_column_that_some_rows_leave_out(tmp_path, streaming):
    """JSON leaves out what a table has as null; a name that no row has is a slip of the pen."""
    columns = {"prompt": "q", "system": "sys", "history": "h"}
    rows = [{"q": "why so?", **ANSWERS, "sys": "be brief"}, {"q": "why so?", **ANSWERS, "h": []}]
    file = tmp_path / "rows.jsonl"

    def read(**options):
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        options |= {"train": str(file), "cache_dir": str(tmp_path / "cache"), "format": "alpaca"}
        if streaming:
            data = ExampleStream(DataConfig(**options, streaming=True), chat_tokenizer()).read()
        else:
            data = load_examples(DataConfig(**options), chat_tokenizer(), split="train")
        return [data[index]["chosen_ids"] for index in range(len(data))]

    assert len(read(columns=columns)) == 2
    with pytest.raises(UserError, match="data.columns.input='x' is not used: no row has this"):
        read(columns=columns | {"input": "x"})
    with pytest.raises(UserError, match="rows.jsonl:1: missing field 'good'"):
        read(columns=columns | {"chosen": "good"})
    rows[1] |= {"system": "be long"}
    with pytest.raises(UserError, match="rows.jsonl:2: missing field 'sys'"):
        read(columns=columns)


@pytest.mark.parametrize("name", ["question", "query", "input"])
def test_a_question_that_is_messages(name):
    talk = [SYSTEM, *BEFORE, U]
    for value in (talk, json.dumps(talk)):
        assert ids({name: value, **ANSWERS}) == ids(PAIR | {"prompt": talk})
    history = {"instruction": "why so?", **ANSWERS, "history": BEFORE}
    assert ids(history) == ids(NEW_BEFORE)


def test_text_is_had_by_naming_the_prompt():
    raw = {"question": "why so?", **ANSWERS}
    assert ids(raw, columns={"prompt": "question"}) == ids({"prompt": "why so?", **ANSWERS})


def test_options_of_openrlhf_have_other_names_here():
    with pytest.raises(ValueError, match="input_key='q': this column is called 'prompt' here"):
        DataConfig(train="f", columns={"input_key": "q"})


# Ties, and what a form cannot carry

TIES = {
    "helpsteer2": {"prompt": "q", "response": ["a", "b"], "helpfulness": [3, 3]},
    "helpsteer3": {"context": [U], "response1": "a", "response2": "b", "overall_preference": 0},
    "arena": {"conversation_a": [U, A], "conversation_b": [U, B], "winner": "tie (bothbad)"},
    "nemo_rl": {
        "context": [U],
        "completions": [{"rank": 1, "completion": [A]}, {"rank": 1, "completion": [B]}],
    },
}


@pytest.mark.parametrize("form", TIES)
def test_a_tie_is_dropped_with_its_reason(form):
    with pytest.raises(Dropped, match="a tie"):
        ids(TIES[form])


def test_pairs_of_groups():
    options = {"group_pairs": "best_worst"}
    for canonical in (SCORED, RANKED):
        assert ids(canonical, **options) == ids(PAIR)
    with pytest.raises(Dropped, match="a tie"):
        ids(THREE | {"scores": [1, 1, 1]}, **options)
    assert ids(PAIR, **options) == ids(PAIR)


BAD = [
    ({"messages": [U]}, "no answer: the conversation has no message of the assistant"),
    ({"text": 3}, "field 'text' is not text: got int"),
    ({"instruction": 3, **ANSWERS}, "field 'instruction' is not text: got int"),
    ({"instruction": "q", "history": [["a"]], **ANSWERS}, r"not a pair: history\[0\]"),
    ({"instruction": "q", "history": "a", **ANSWERS}, "field 'history' is not a list"),
    ({"instruction": "q", "history": True, **ANSWERS}, "field 'history' is not a list"),
    ({"instruction": "q", "history": {"a": 1}, **ANSWERS}, "field 'history' is not a list"),
    ({"instruction": "q", "system": "\ud83d", **ANSWERS}, "not Unicode text: it has a lone"),
    ({"prompt": "q", "response": "a", "helpfulness": 3}, "one response to a prompt: consecutive"),
    (
        {"prompt": "q", "response": ["a", "b"], "helpfulness": [3]},
        "'helpfulness' has another length than 'response': got 1 for 2 responses",
    ),
    ({"prompt": "q", "answers": [{"answer": "a", "rank": 1}]}, "a group of one"),
    ({"prompt": "q", "answers": [{"answer": "a", "rank": "x"}]}, "field 'rank' is not a number"),
    (
        {"prompt": "q", "answers": [{"answer": "a", "rank": 1}, {"answer": "a"}]},
        r"answers\[1\] has no 'rank'",
    ),
    (
        {"instruction": "q", "completions": [{"response": "a"}, {"response": "b"}]},
        r"completions\[0\] has no rating",
    ),
    *(
        (
            {"instruction": "q", "completions": [{"response": "a", "annotations": wrong}] * 2},
            r"completions\[0\] has no rating",
        )
        for wrong in ([1], "x", {"helpfulness": "x"}, {"helpfulness": [1]})
    ),
    ({"conversation_a": [U, A], "conversation_b": [U, B], "winner": {}}, "unknown winner"),
    ({"conversation_a": [U, A], "conversation_b": [U, B], "winner": "x"}, "unknown winner.*'x'"),
    ({"messages": [U], "rejected_response": "no"}, "messages does not end with an answer"),
    ({"messages": [U, A], "label": 3}, "field 'label' is not a bool"),
    (
        {"prompt": "q", "response_0": "a", "response_1": "b", "better_response_id": 2},
        "'better_response_id' is not 0 or 1: got 2",
    ),
    ({"messages": [SYSTEM, U], "system": "be long", **ANSWERS}, "two system messages"),
]


@pytest.mark.parametrize("raw, message", BAD)
def test_what_a_form_cannot_carry(raw, message):
    with pytest.raises(BadRow, match=message):
        ids(raw)


# HelpSteer2: a row for each response


def test_consecutive_rows_of_one_prompt_are_merged():
    def row(prompt, response, helpfulness):
        return {"prompt": prompt, "response": response, "helpfulness": helpfulness, "verbosity": 1}

    rows = [
        row("q", "a", 1),
        row("q", "b", 4),
        row("r", "c", 3),
        row("q", "d", 0),
        row("q", "e", 2),
    ]
    found = list(
        merged(((f"f:{n}", each) for n, each in enumerate(rows, 1)), DataConfig(train="f"))
    )
    assert [where for where, _ in found] == ["f:1", "f:3", "f:4"]
    assert found[0][1] == row("q", ["a", "b"], [1, 4])
    assert rows[0] == row("q", "a", 1)  # as it was
    chosen = parse_row(*found[2], DataConfig(train="f"))
    assert (chosen.chosen, chosen.rejected) == ([say("assistant", "e")], [say("assistant", "d")])
    assert list(merged(iter([("f:1", PAIR)]), DataConfig(train="f"))) == [("f:1", PAIR)]
