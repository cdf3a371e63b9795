"""Held-out prompts: which of the evaluation data are answered, and rows that have none."""

import json

import pytest

from dpo_fast.data.dataset import load_examples
from dpo_fast.data.images.marks import named
from dpo_fast.errors import UserError
from dpo_fast.training.config import build_config
from dpo_fast.training.held_out_prompts import choose_prompts
from tests.support.image_rows import picture, write_qwen
from tests.support.tokenizers import chat_tokenizer


def chosen(folder, rows, tokenizer=None):
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    other = folder / "other.jsonl"
    other.write_text(json.dumps({"text": "another"}))
    data = {"train": str(other), "eval": str(file), "cache_dir": str(folder / "cache")}
    tree = {"model": {"path": "m"}, "data": data, "loss": {"type": "sft"}}
    config = build_config(tree | {"train": {"output_dir": str(folder)}}, "test")
    read = config.data.model_copy(update={"train": str(file), "eval": None})
    examples = load_examples(read, tokenizer or chat_tokenizer(), split="train")
    return choose_prompts(config, examples, 10, 0)


def test_conversations_that_begin_alike_are_several_prompts(tmp_path):
    def talk(number):
        said = [("assistant", "hello"), ("user", f"question {number}"), ("assistant", "yes")]
        return {"messages": [{"role": role, "content": text} for role, text in said]}

    found = chosen(tmp_path, [talk(number % 3) for number in range(6)])
    assert {each.prompt.prompt[-1]["content"] for each in found} == {
        "question 0",
        "question 1",
        "question 2",
    }
    assert len(found) == 3


@pytest.mark.parametrize(
    "row", [{"text": "abc"}, {"messages": [{"role": "assistant", "content": "hello"}]}]
)
def test_a_row_without_a_prompt_is_told_as_such(tmp_path, row):
    with pytest.raises(UserError, match="rows.jsonl:1: nothing comes before its answer.*generate"):
        chosen(tmp_path, [row])


def test_prompts_bring_their_images(tmp_path):
    tokenizer = write_qwen(tmp_path / "model")
    picture(0).save(tmp_path / "a.png")

    def row(number, images):
        said = [{"role": "user", "content": f"q{number}"}, {"role": "assistant", "content": "yes"}]
        return {"messages": said, "images": images}

    rows = [row(0, ["a.png"]), row(1, []), row(2, ["a.png"])]
    found = {
        named(each.prompt.prompt)[0]["content"]: each for each in chosen(tmp_path, rows, tokenizer)
    }
    assert found.keys() == {"[image 1]q0", "q1", "[image 1]q2"}
    assert found["[image 1]q0"].prompt.images[0]["path"] == str(tmp_path / "a.png")
