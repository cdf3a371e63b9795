"""Rows of text on a model that has a chat template: as they stand, and as chats."""

import json

import pytest

from dpo_fast.data.config import DataConfig
from dpo_fast.data.dataset import load_examples
from dpo_fast.errors import UserError
from tests.support.tokenizers import byte_tokenizer, chat_tokenizer

PAIR = {"prompt": "why?", "chosen": "because", "rejected": "no idea"}
ROWS = {
    "pairs": (PAIR, ("chosen", "rejected")),
    "unpaired": ({"prompt": "why?", "completion": "because", "label": True}, ("completion",)),
    "groups": (
        {"prompt": "why?", "completions": ["because", "no idea"], "scores": [1, 0]},
        ("completions",),
    ),
}


def as_chat(row: dict, answers: tuple[str, ...]) -> dict:
    """The same row by messages."""
    say = lambda text: [{"role": "assistant", "content": text}]  # noqa: E731
    chats = {
        name: [say(text) for text in row[name]] if isinstance(row[name], list) else say(row[name])
        for name in answers
    }
    return row | {"prompt": [{"role": "user", "content": row["prompt"]}]} | chats


def load(folder, rows, tokenizer=None, **options):
    file = folder / f"rows-{len(list(folder.iterdir()))}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(train=str(file), cache_dir=str(folder / "cache"), **options)
    return load_examples(config, tokenizer or chat_tokenizer(), split="train")


def ids(examples) -> list[dict]:
    names = examples.kind.ids
    return [{name: examples[index][name] for name in names} for index in range(len(examples))]


@pytest.mark.parametrize("kind", ROWS)
def test_texts_become_the_chat_that_messages_are(tmp_path, kind):
    row, answers = ROWS[kind]
    text = load(tmp_path, [row], apply_chat_template=True)
    chat = load(tmp_path, [as_chat(row, answers)])
    bare = load(tmp_path, [row], apply_chat_template=False)
    assert ids(text) == ids(chat) != ids(bare)


def test_a_system_column_and_an_empty_prompt(tmp_path):
    row = PAIR | {"system": "be brief"}
    chat = as_chat(PAIR, ("chosen", "rejected"))
    chat["prompt"] = [{"role": "system", "content": "be brief"}, *chat["prompt"]]
    assert ids(load(tmp_path, [row], apply_chat_template=True)) == ids(load(tmp_path, [chat]))


def test_messages_stay_what_they_are(tmp_path):
    chat = as_chat(PAIR, ("chosen", "rejected"))
    assert ids(load(tmp_path, [chat], apply_chat_template=True)) == ids(load(tmp_path, [chat]))
    assert ids(load(tmp_path, [chat], apply_chat_template=False)) == ids(load(tmp_path, [chat]))


def test_whole_texts_have_no_prompt_to_make_a_message_of(tmp_path):
    row = {"chosen": "why? because", "rejected": "why? no idea"}
    with pytest.raises(UserError, match="no prompt column: data.apply_chat_template=true makes it"):
        load(tmp_path, [row], apply_chat_template=True)


@pytest.mark.parametrize(
    ("options", "tokenizer", "said"),
    [
        ({}, chat_tokenizer, True),
        ({"apply_chat_template": False}, chat_tokenizer, False),
        ({"apply_chat_template": True}, chat_tokenizer, False),
        ({}, lambda: byte_tokenizer(bos=True), False),
    ],
)
def test_a_line_says_that_a_template_is_not_used(tmp_path, options, tokenizer, said):
    report = load(tmp_path, [PAIR, PAIR | {"prompt": "how?"}], tokenizer(), **options).report
    lines = [note for note in report.notes() if "without its chat template" in note]
    assert len(lines) == said
    assert report.bare == 2 * said
    if said:
        assert lines[0].startswith("2 of 2 pairs are text")
