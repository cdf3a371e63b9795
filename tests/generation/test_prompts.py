"""Prompts of all that people bring: rows without answers, of SFT, of pairs, of groups."""

from __future__ import annotations

import json

import pytest

from dpo_fast.data.config import DataConfig
from dpo_fast.data.verdicts import BadRow
from dpo_fast.errors import UserError
from dpo_fast.generation.config import SampleSection
from dpo_fast.generation.engine import STOP, Completion
from dpo_fast.generation.prompts import prompt_of, read_prompts
from dpo_fast.generation.sample_rows import sample_row
from tests.support.image_rows import picture


def user(content: str) -> dict:
    return {"role": "user", "content": content}


SYSTEM = {"role": "system", "content": "be brief"}
SAID = {"role": "assistant", "content": "so"}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
ROWS = [
    ({"prompt": "2 + 2 is"}, "2 + 2 is"),
    ({"prompt": [user("q")]}, [user("q")]),
    ({"prompt": json.dumps([user("q")])}, [user("q")]),
    ({"prompt": [user("q"), {"role": "assistant", "content": "It is"}]},
     [user("q"), {"role": "assistant", "content": "It is"}]),
    ({"prompt": [user("q")], "system": "be brief"}, [SYSTEM, user("q")]),
    ({"messages": [user("q")]}, [user("q")]),
    ({"messages": [SYSTEM, user("q"), SAID]}, [SYSTEM, user("q")]),
    ({"messages": [user("q"), SAID, user("r"), SAID]}, [user("q"), SAID, user("r")]),
    ({"messages": [user("q")], "prompt": None}, [user("q")]),
    ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "so"}]}, [user("q")]),
    ({"question": "how many?", "answer": "#### 4"}, [user("how many?")]),
    ({"instruction": "add", "input": "2", "output": "so"}, [user("add\n2")]),
    ({"instruction": "add", "input": ""}, [user("add")]),
    ({"instruction": "add", "system": "be brief", "history": [["a", "b"]]},
     [SYSTEM, user("a"), {"role": "assistant", "content": "b"}, user("add")]),
    ({"query": "q", "response": "so"}, [user("q")]),
    ({"prompt": "p", "completion": "so"}, "p"),
    ({"prompt": "p", "completion": "so", "label": True}, "p"),
    ({"prompt": "p", "chosen": "a", "rejected": "b"}, "p"),
    ({"prompt": "p q", "chosen": [user("p q"), SAID], 
      "rejected": [user("p q"), SAID | {"content": "no"}]},
     [user("p q")]),
    ({"chosen": "\n\nHuman: x\n\nAssistant: y", "rejected": "\n\nHuman: x\n\nAssistant: z"},
     "\n\nHuman: x\n\nAssistant:"),
    ({"prompt": "p", "response": "so"}, "p"),
    ({"prompt": "p", "generations": ["a", "b"], "correctness": [True, False]}, "p"),
    ({"prompt": "p", "label": "cat"}, "p"),  # tells of no answer: the row has none
    ({"question": "q", "label": 3}, [user("q")]),
    ({"prompt": "q", "messages": [user("q"), SAID, user("r"), SAID]}, "q"),
    ({"prompt": "\n\nHuman: q \n\nAssistant: ",
      "answers": [{"answer": "a", "rank": 1}, {"answer": "b", "rank": 2}]}, [user("q")]),
    # Ties and single answers are no preferences, but have a prompt.
    ({"conversation_a": [user("q"), SAID], "conversation_b": [user("q"), SAID], "winner": "tie"},
     [user("q")]),
    ({"context": [user("q")], "response1": "a", "response2": "b", "overall_preference": 0},
     [user("q")]),
    ({"prompt": "q", "response": "a", "helpfulness": 3}, [user("q")]),
    ({"question": "q", "chosen": "a", "rejected": "a"}, [user("q")]),
    ({"messages": [user("q"), SAID], "rejected_response": "so"}, [user("q")]),
    ({"chosen": [user("q"), SAID], "rejected": [user("q"), SAID]}, [user("q")]),
    ({"input": {"messages": [user("q")]}, "preferred_output": [SAID],
      "non_preferred_output": [SAID]}, [user("q")]),
    ({"prompt": "p", "chosen": "a", "rejected": "a"}, "p"),  # no pair, but a prompt
    ({"prompt": "p", "completions": ["a", "b"], "scores": [1, 2]}, "p"),
    ({"prompt": "p", "completions": ["a", ""]}, "p"),
    ({"prompt": "p", "chosen": [SAID], "rejected": [SAID]}, [user("p")]),
    ({"input": {"messages": [user("q")]}, "preferred_output": [SAID],
      "non_preferred_output": [SAID | {"content": "no"}]}, [user("q")]),
    ({"prompt": "p", "response_1": "a", "response_2": "b", "preference_strength": 1}, "p"),
]  # fmt: skip


@pytest.mark.parametrize("row, prompt", ROWS, ids=range(len(ROWS)))
def test_the_prompt_of_a_row_is_found(tmp_path, row, prompt):
    found = prompts(tmp_path, [row]).items
    wanted = [user(prompt)] if "response_1" in row else prompt
    assert found[0].prompt == wanted


def prompts(folder, rows: list, data=None, **section):
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(train=str(file), **(data or {}))
    return read_prompts(config, SampleSection(prompts=str(file), **section))


def test_judges_get_the_rest_of_the_row_and_templates_their_columns(tmp_path):
    row = {"prompt": [user("q")], "tools": TOOLS, "chat_template_kwargs": {"deep": True}, "gold": 4}
    (found,) = prompts(tmp_path, [row | {"id": 7, "none": None}]).items
    assert found.optional == {"tools": TOOLS, "chat_template_kwargs": {"deep": True}}
    assert found.row == {"gold": 4, "id": 7}
    assert found.where.endswith("rows.jsonl:1")


def test_prompts_differ_by_their_images(tmp_path):
    for seed, name in enumerate(("a.png", "b.png")):
        picture(seed).save(tmp_path / name)
    raw = {"prompt": [user("q")], "gold": "g"}
    rows = [raw | {"images": [name]} for name in ("a.png", "b.png", "a.png")]
    rows += [raw | {"images": []}, raw | {"images": [{"path": "a.png", "max_pixels": 64}]}]
    found = prompts(tmp_path, rows)
    assert len(found.items) == 4 and found.repeated == 1
    assert [len(each.images) for each in found.items] == [1, 1, 0, 1]
    assert all(each.row == {"gold": "g"} for each in found.items if each.images)
    shown = sample_row(found.items[0], [Completion("yes", STOP)], None)
    path = str(tmp_path / "a.png")
    assert shown["prompt"][0]["content"] == [
        {"type": "image", "image": path},
        {"type": "text", "text": "q"},
    ]
    with pytest.raises(BadRow, match=r"images\[0\] is not there"):
        prompt_of("rows:1", raw | {"images": ["c.png"]}, DataConfig(train="rows"))


def test_numbers_that_json_has_not_are_null_for_judges(tmp_path):
    """As text, "nan" would be an answer that a judge compares with."""
    raw = {"prompt": "q", "gold": float("nan"), "more": {"a": [1.0, float("inf")]}}
    found = prompt_of("rows:1", raw, DataConfig(train="rows"))
    assert found.row == {"gold": None, "more": {"a": [1.0, None]}}


@pytest.mark.parametrize("data", [{}, {"format": "sft"}])
def test_the_prompt_of_a_conversation_to_learn_is_what_comes_before_its_last_answer(tmp_path, data):
    """Trained on, its prompt ends before the first."""
    talk = [user("q"), SAID, user("r"), SAID]
    pair = {"chosen": [user("s"), SAID], "rejected": [user("s"), SAID | {"content": "no"}]}
    rows = [{"messages": talk}, pair | {"messages": pair["chosen"]}]
    for row, wanted in zip(rows, (talk[:3], [user("s")])):
        (found,) = prompts(tmp_path, [row], data=data).items
        assert found.prompt == wanted


def test_each_prompt_comes_once(tmp_path):
    rows = [{"prompt": "p", "chosen": a, "rejected": b} for a, b in (("a", "b"), ("c", "a"))]
    found = prompts(tmp_path, [*rows, {"prompt": "q", "chosen": "a", "rejected": "b"}])
    assert [each.prompt for each in found.items] == ["p", "q"]
    assert (found.rows, found.repeated) == (3, 1)
    assert found.items[0].row["chosen"] == "a"


def test_the_system_prompt_is_for_chats_that_have_none(tmp_path):
    rows = [{"prompt": [user("q")]}, {"prompt": [SYSTEM, user("q")]}, {"prompt": "text"}]
    found = prompts(tmp_path, rows, system_prompt="be glad").items
    assert found[0].prompt == [{"role": "system", "content": "be glad"}, user("q")]
    assert found[1].prompt == [SYSTEM, user("q")]
    assert found[2].prompt == "text"
    with pytest.raises(
        UserError, match="system_prompt='be glad' is not used: all prompts are text"
    ):
        prompts(tmp_path, rows[2:], system_prompt="be glad")
    made = prompts(tmp_path, rows[2:], {"apply_chat_template": True}, system_prompt="be glad")
    assert made.items[0].prompt == [{"role": "system", "content": "be glad"}, user("text")]


def test_options_of_data_say_how_rows_are_read(tmp_path):
    rows = [{"ask": "q", "words": "x y"}]
    found = prompts(tmp_path, rows, {"columns": {"prompt": "ask"}}).items
    assert (found[0].prompt, found[0].row) == ("q", {"words": "x y"})
    with pytest.raises(UserError, match="rows.jsonl:1: missing field 'prompt'"):
        prompts(tmp_path, rows)
    with pytest.raises(UserError, match="column 'system' is not used"):
        prompts(tmp_path, [{"prompt": "p", "system": "be brief"}])
    assert (
        len(prompts(tmp_path, [{"prompt": f"{i}"} for i in range(9)], {"max_rows": 4}).items) == 4
    )


def test_bad_rows_are_told_or_counted(tmp_path):
    rows = [{"prompt": "p"}, {"prompt": 3}, {"prompt": "  "}, {"other": "x y"}]
    with pytest.raises(UserError, match="rows.jsonl:2: field 'prompt' has the wrong type"):
        prompts(tmp_path, rows)
    found = prompts(tmp_path, rows, {"on_bad_row": "skip"})
    assert len(found.items) == 1 and found.bad.total == 3
    with pytest.raises(UserError, match="no row has a prompt. .*:1: field 'prompt'"):
        prompts(tmp_path, rows[1:], {"on_bad_row": "skip"})


def test_a_share_of_the_prompts_is_drawn_by_the_seed(tmp_path):
    rows = [{"prompt": f"{i}"} for i in range(50)]
    drawn = [prompts(tmp_path, rows, max_prompts=9, seed=seed) for seed in (0, 0, 1)]
    texts = [[each.prompt for each in found.items] for found in drawn]
    assert texts[0] == texts[1] != texts[2]
    assert len(texts[0]) == 9 and texts[0] == sorted(texts[0], key=int) != [
        str(i) for i in range(9)
    ]


def test_the_digest_changes_with_anything_of_the_prompts(tmp_path):
    base = {"prompt": "p", "gold": 4}
    changed = [base, base | {"gold": 5}, base | {"prompt": "q"}, base | {"id": 1}]
    assert len({prompts(tmp_path, [row]).digest for row in changed}) == len(changed)
