"""Raw rows to PairRow: layouts, implicit prompts, and every kind of bad row."""

import math
import re

import pytest
from pydantic import ValidationError

from dpo_fast.data.config import DataConfig
from dpo_fast.data.rows import parse_row
from dpo_fast.data.tokenise import RowTokeniser
from dpo_fast.data.verdicts import BadRow, Dropped, Verdict
from tests.support.tokenizers import CHATML, byte_tokenizer


def say(role, content, **more):
    return {"role": role, "content": content, **more}


U, A, B = say("user", "hi"), say("assistant", "yes"), say("assistant", "no")
TEXT = {"prompt": "Q", "chosen": "yes", "rejected": "no"}
CHAT = {"prompt": [U], "chosen": [A], "rejected": [B]}


def unused(raw, config):
    """The columns of a row that are passed over."""
    names = set()
    parse_row("f.jsonl:7", raw, config, names)
    return names


def parse(raw, **options):
    return parse_row("f.jsonl:7", raw, DataConfig(train="f.jsonl", **options))


def parts(raw, **options):
    row = parse(raw, **options)
    return row.prompt, row.chosen, row.rejected


def refuses(raw, **options):
    """What is said of a row. Empty and equal answers are left out, and any other fault is a mistake."""
    with pytest.raises(Verdict) as caught:
        parse(raw, **options)
    message = str(caught.value)
    left_out = re.match(r"empty (chosen|rejected|completion)|chosen equals rejected", message)
    assert type(caught.value) is (Dropped if left_out else BadRow), message
    return message


def test_explicit_layouts():
    assert parts(TEXT) == ("Q", "yes", "no")
    assert parts(CHAT) == ([U], [A], [B])
    assert parts(CHAT | {"prompt": "hi"}) == ([U], [A], [B])
    assert parts(CHAT | {"chosen": "yes", "rejected": "no"}) == ([U], [A], [B])
    assert parts(CHAT | {"chosen": A, "rejected": B}) == ([U], [A], [B])
    assert parse(TEXT).where == "f.jsonl:7"


def test_column_mapping():
    raw = {"question": "Q", "good": "yes", "bad": "no", "id": 3}
    columns = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    assert parts(raw, columns=columns) == ("Q", "yes", "no")
    assert unused(raw, DataConfig(train="f", columns=columns)) == {"id"}
    message = refuses(TEXT, columns={"chosen": "chosn"})
    assert "missing field 'chosn'" in message
    assert "did you mean 'chosen'?" in message


def test_implicit_prompt_ends_at_the_last_marker():
    start = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    raw = {"chosen": start + " same one", "rejected": start + " same two"}
    assert parts(raw) == (start, " same one", " same two")
    raw = {"chosen": "Q### yes", "rejected": "Q### no"}
    assert parts(raw, prompt_end="###") == ("Q###", " yes", " no")


@pytest.mark.parametrize(
    "chosen, rejected, expected",
    [
        ("What is it? Fine one.", "What is it? Fine two.", ("What is it? Fine", " one.", " two.")),
        ("Question\nyes", "Question\nyet", ("Question\n", "yes", "yet")),
        ("Q A", "Q A more", ("Q", " A", " A more")),
    ],
)
def test_implicit_prompt_without_marker_ends_with_a_word(chosen, rejected, expected):
    assert parts({"chosen": chosen, "rejected": rejected}) == expected


def test_implicit_prompt_of_conversations():
    shared = [say("system", "s"), U, A, U]
    assert parts({"chosen": shared + [A], "rejected": shared + [B]}) == (shared, [A], [B])
    # An assistant message that both share is an answer's first, not the prompt's last.
    assert parts({"chosen": [U, A], "rejected": [U, A, B]}) == ([U], [A], [A, B])


def test_ultrafeedback_prompt_is_not_doubled():
    raw = {"prompt": "hi", "chosen": [U, A], "rejected": [U, B]}
    assert parts(raw) == ([U], [A], [B])
    assert parts(raw | {"prompt": [U]}) == ([U], [A], [B])
    system = say("system", "s")
    assert parts(raw | {"chosen": [system, U, A], "rejected": [system, U, B]})[0] == [system, U]
    assert "do not begin with the prompt" in refuses(raw | {"prompt": "other"})


def test_extras():
    raw = TEXT | {"weight": 2, "margin": -1.5, "soft_label": 0.75, "tools": None}
    raw |= {"reference_chosen_logps": -3.0, "reference_rejected_logps": -4}
    assert parse(raw).optional == {
        "weight": 2.0,
        "margin": -1.5,
        "soft_label": 0.75,
        "reference_chosen_logps": -3.0,
        "reference_rejected_logps": -4.0,
    }
    raw = CHAT | {"tools": '[{"name": "f"}]', "chat_template_kwargs": {"think": False, "x": None}}
    assert parse(raw).optional == {
        "tools": [{"name": "f"}],
        "chat_template_kwargs": {"think": False},
    }


def test_rounding_may_leave_a_certain_answer_above_0():
    sums = {"reference_chosen_logps": 2e-6, "reference_rejected_logps": 0.0}
    assert parse(TEXT | sums).optional == sums


def test_null_keys_of_messages_are_left_out():
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    raw = {"prompt": [U | {"name": None}], "chosen": [call], "rejected": [B]}
    assert parts(raw) == ([U], [call | {"content": ""}], [B])


BAD = [
    ({"chosen": "a", "rejectd": "b"}, ["missing field 'rejected'", "did you mean 'rejectd'?"]),
    ({}, ["missing field 'chosen'", "no fields"]),
    (TEXT | {"chosen": None}, ["field 'chosen' has the wrong type", "got null"]),
    (TEXT | {"prompt": 3}, ["field 'prompt' has the wrong type", "got int"]),
    (TEXT | {"prompt": " \n"}, ["empty prompt"]),
    (TEXT | {"chosen": "\t"}, ["empty chosen"]),
    (TEXT | {"rejected": ""}, ["empty rejected"]),
    (TEXT | {"rejected": "yes"}, ["chosen equals rejected"]),
    (TEXT | {"chosen": "\ud800"}, ["field 'chosen' is not Unicode text", "surrogate"]),
    (TEXT | {"chosen": [A]}, ["chosen and rejected differ in kind"]),
    (CHAT | {"chosen": []}, ["empty chosen"]),
    (CHAT | {"chosen": ["x"]}, ["not a message", "chosen[0]", "got str"]),
    (CHAT | {"chosen": [{"content": "x"}]}, ["message without role", "chosen[0]", "'content'"]),
    (CHAT | {"chosen": [{"from": "gpt"}]}, ["content is not text", "chosen[0].content"]),
    (
        CHAT | {"chosen": [say("narrator", "x")]},
        ["unknown role 'narrator'", "chosen[0].role", "assistant"],
    ),
    (CHAT | {"chosen": [say("assistant", 3)]}, ["content is not text", "chosen[0]", "got int"]),
    (CHAT | {"chosen": [say("assistant", " ")]}, ["empty chosen"]),
    (CHAT | {"rejected": [B, U, say("assistant", "")]}, ["empty rejected", "message 2"]),
    (CHAT | {"prompt": [U, say("assistant", " ")]}, ["empty prompt", "(assistant) has no text"]),
    (CHAT | {"prompt": [say("user", " ")]}, ["empty prompt"]),
    ({"chosen": [U, A], "rejected": [say("user", "ho"), B]}, ["no common prompt"]),
    ({"chosen": [U], "rejected": [U, B]}, ["empty chosen"]),
    (TEXT | {"weight": -1}, ["field 'weight' is out of range"]),
    (TEXT | {"weight": "1"}, ["field 'weight' is not a number", "'1'"]),
    (TEXT | {"weight": True}, ["field 'weight' is not a number"]),
    (TEXT | {"margin": math.nan}, ["field 'margin' is not finite", "nan"]),
    (TEXT | {"margin": 10**400}, ["field 'margin' is not finite"]),
    (TEXT | {"margin": -1e308}, ["field 'margin' is out of range", "-1e+308 is beyond 1e+18"]),
    (TEXT | {"weight": 1e39}, ["field 'weight' is out of range", "the loss is in fp32"]),
    (
        TEXT | {"reference_chosen_logps": -1.0, "reference_rejected_logps": -2e18},
        ["field 'reference_rejected_logps' is out of range"],
    ),
    (
        TEXT | {"reference_chosen_logps": 12.5, "reference_rejected_logps": -1.0},
        ["field 'reference_chosen_logps' is out of range", "12.5 is above 0", "turn its sign"],
    ),
    (
        TEXT | {"reference_chosen_logps": -1, "reference_rejected_logps": 2},
        ["field 'reference_rejected_logps' is out of range", "2 is above 0"],
    ),
    (TEXT | {"soft_label": 1.5}, ["field 'soft_label' is out of range", "1.5"]),
    (TEXT | {"reference_chosen_logps": -1.0}, ["reference_chosen_logps without its partner"]),
    (TEXT | {"tools": [{"name": "f"}]}, ["tools without messages"]),
    (CHAT | {"tools": "{"}, ["field 'tools' is not JSON"]),
    (CHAT | {"tools": {"name": "f"}}, ["field 'tools' has the wrong type", "a list"]),
    (CHAT | {"chat_template_kwargs": {"tokenize": 1}}, ["chat_template_kwargs sets 'tokenize'"]),
]


@pytest.mark.parametrize("raw, words", BAD)
def test_bad_rows(raw, words):
    message = refuses(raw)
    assert all(word in message for word in words), message


def test_bad_dialogues():
    start = "\n\nHuman: a\n\nAssistant:"
    later = start + " b\n\nHuman: c\n\nAssistant:"
    for chosen, rejected in [(start + " x", later + " y"), (later + " x", start + " y")]:
        assert "no common prompt" in refuses({"chosen": chosen, "rejected": rejected})
    assert "empty chosen" in refuses({"chosen": start, "rejected": start + " y"})
    assert "no prompt marker" in refuses({"chosen": start + " x", "rejected": "y"})


def test_format_is_enforced():
    assert parts(TEXT, format="pairs") == ("Q", "yes", "no")
    assert "not in data.format=messages" in refuses(TEXT, format="messages")
    assert "not in data.format=pairs" in refuses(CHAT, format="pairs")


@pytest.mark.parametrize(
    "options, words",
    [
        ({"max_length": 1}, ["data.max_length=1", "at least 2"]),
        ({"max_length": 8, "max_prompt_length": 8}, ["data.max_prompt_length=8", "try 4"]),
        ({"max_prompt_length": 0}, ["data.max_prompt_length=0", "at least 1"]),
        ({"workers": 0}, ["data.workers=0"]),
        ({"eval": "f"}, ["data.eval='f' is also in data.train", "data.eval_rows"]),
        ({"eval": "g", "eval_rows": 3}, ["data.eval_rows=3", "data.eval='g'"]),
        ({"columns": {"good": "x"}}, ["data.columns.good='x'", "chosen"]),
        ({"prompt_end": " "}, ["data.prompt_end=' '", "blank"]),
        ({"train": []}, ["data.train=[] names no data"]),
        ({"maxlength": 3}, ["maxlength"]),
    ],
)
def test_impossible_options(options, words):
    with pytest.raises(ValidationError) as caught:
        DataConfig(**({"train": "f"} | options))
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_texts_that_repeat_their_prompt():
    """As messages that do: what is scored is what follows the prompt."""
    prompt = "Q: 3+3?\nA:"
    pair = {"prompt": prompt, "chosen": prompt + " 6", "rejected": prompt + " 7"}
    assert parts(pair) == (prompt, " 6", " 7")
    single = {"prompt": prompt, "completion": prompt + " 6", "label": True}
    assert parse(single).completion == " 6"
    group = {"prompt": prompt, "completions": [prompt + " 6", prompt + " 7"], "scores": [1, 0]}
    assert parse(group).completions == [" 6", " 7"]
    # An answer that quotes the question is an answer, and so is a greeting.
    assert parts(pair | {"rejected": "7"}) == (prompt, prompt + " 6", "7")
    greeting = {"prompt": "Hi", "chosen": "Hi there", "rejected": "Hi you"}
    assert parts(greeting) == ("Hi", "Hi there", "Hi you")
    assert "empty chosen" in refuses(pair | {"chosen": prompt})


def test_messages_that_repeat_their_prompt():
    single = {"prompt": [U], "completion": [U, A], "label": True}
    assert (parse(single).prompt, parse(single).completion) == ([U], [A])
    group = {"prompt": "hi", "completions": [[U, A], [U, B]], "scores": [1, 0]}
    assert (parse(group).prompt, parse(group).completions) == ([U], [[A], [B]])


def test_texts_with_nothing_in_common_have_no_prompt():
    assert parts({"chosen": "abc", "rejected": "abd"}) == ("", "abc", "abd")
    assert parts(TEXT | {"prompt": ""}) == ("", "yes", "no")
    assert parts({"chosen": [A], "rejected": [B]}) == ([], [A], [B])
    assert parts({"prompt": "", "chosen": [A], "rejected": [B]}) == ([], [A], [B])
    assert "no common prompt" in refuses({"chosen": [U, A], "rejected": [say("user", "ho"), B]})


@pytest.mark.parametrize("chat", [False, True])
def test_an_answer_that_was_cut_off_has_no_end_of_turn(chat):
    """In every kind of row; the end of turn of the others stays."""
    config = DataConfig(train="x", apply_chat_template=chat)
    tokenizer = byte_tokenizer(bos=True, template=CHATML)
    tokenise = RowTokeniser(tokenizer, config)
    end = "<|im_end|>" if chat else "</s>"

    def texts(raw, config=config):
        found = vars(tokenise(parse_row("w", {"prompt": "q: ", **raw}, config)))
        names = ("chosen_ids", "rejected_ids", "completion_ids")
        ids = found.get("completions_ids") or [found[name] for name in names if name in found]
        answers = [tokenizer.decode(each) for each in ids]
        assert found["eos_added"] == (0 if chat else sum(end in each for each in answers))
        return answers

    pair = {"chosen": "ab", "rejected": "cde"}
    assert texts(pair | {"rejected_finish_reason": "length"}) == ["ab" + end, "cde"]
    assert texts(pair | {"chosen_finish_reason": "length"}) == ["ab", "cde" + end]
    assert texts(pair | {"rejected_finish_reason": "stop"}) == ["ab" + end, "cde" + end]
    single = {"completion": "ab", "label": True}
    assert texts(single | {"finish_reason": "length"}) == ["ab"]
    group = {"completions": ["ab", "c", "de"], "scores": [0, 2, 1]}
    group |= {"finish_reasons": ["length", "stop", None]}
    assert texts(group) == ["ab", "c" + end, "de" + end]
    best = config.model_copy(update={"group_pairs": "best_worst"})
    assert texts(group, best) == ["c" + end, "ab"]
    with pytest.raises(BadRow, match="finish_reasons and completions differ in number"):
        texts(group | {"finish_reasons": ["stop"]})
