"""Answers to learn: of rows that have one, of conversations, and the best of a group."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dpo_fast.data import values
from dpo_fast.data.config import DataConfig
from dpo_fast.data.kinds import DEMONSTRATIONS, GROUPS
from dpo_fast.data.messages import Messages
from dpo_fast.data.prompts import (
    as_chat,
    is_dialogue,
    joined,
    repeats,
    split_conversation,
    split_texts,
)
from dpo_fast.data.row_parts import check_chat_columns, check_texts, read_prompt, with_system
from dpo_fast.data.verdicts import BadRow, Dropped

Found = tuple[str | Messages, str | Messages, dict[str, Any]]  # prompt, answer, optional columns


def demonstration(row: Mapping[str, Any], raw: Mapping[str, Any], config: DataConfig) -> Found:
    """The prompt and the answer to it, `completion`, and optional columns. Raises BadRow and Dropped.

    Without a prompt the answer is a conversation, whose prompt ends before the assistant's first turn, or
    a text that tells where its prompt ends.
    """
    completion = values.answer(row, raw, "completion")
    whole = row.get("prompt") is None or (config.prompt_end and row["prompt"] == "")
    if row.get("prompt") is None and not isinstance(completion, str):
        prompt, completion = split_conversation(completion)
    elif whole and isinstance(completion, str) and (config.prompt_end or is_dialogue(completion)):
        prompt, completion, _ = split_texts(completion, completion, config.prompt_end)
    else:
        values.need(row, raw, "prompt")
        told = read_prompt(row["prompt"])
        prompt, (completion,) = joined(told, [completion])
        if not isinstance(completion, str) and completion[0]["role"] != "assistant":
            before, completion = split_conversation(completion)
            if told and not repeats(told, before):
                raise BadRow(
                    "the completion does not begin with the prompt",
                    "it is a whole conversation, so its beginning must be the prompt",
                )
            prompt = before
    prompt, (completion,) = as_chat(prompt, [completion], row, config)
    prompt = with_system(prompt, row)
    check_texts(prompt, {"completion": completion})
    optional = values.optional(row, DEMONSTRATIONS)
    check_chat_columns(prompt, optional)
    return prompt, completion, optional


def best_of(row: Mapping[str, Any], raw: Mapping[str, Any]) -> dict[str, Any]:
    """The row of a group with its best answer alone; the first of several that are as good.

    Raises BadRow and Dropped.
    """
    completions = values.items(row, raw, "completions")
    if not completions:
        raise Dropped("no answer", "completions is an empty list")
    scores = scores_of(row, raw, len(completions))
    place = scores.index(max(scores))
    kept = {name: value for name, value in row.items() if name not in GROUPS.reason_columns}
    cut = values.cut_off(row)
    ended = {"finish_reason": "length"} if cut and cut[place] else {}
    return kept | ended | {"completion": completions[place]}


def scores_of(row: Mapping[str, Any], raw: Mapping[str, Any], count: int) -> list[float]:
    """The scores of so many completions, higher is better. Ranks become negative scores. Raises BadRow."""
    column = _score_column(row)
    scores = values.items(row, raw, column)
    if len(scores) != count:
        raise BadRow(f"{column} and completions differ in number", f"{len(scores)} and {count}")
    numbers = [values.number(each, f"{column}[{index}]") for index, each in enumerate(scores)]
    return [-number for number in numbers] if column == "ranks" else numbers


def _score_column(row: Mapping[str, Any]) -> str:
    """`scores`, higher is better, or `ranks`, lower is better. Raises BadRow if the row has both."""
    given = [name for name in GROUPS.label_columns if row.get(name) is not None]
    if len(given) > 1:
        raise BadRow("scores and ranks", "both say how good completions are: give one of them")
    return given[0] if given else GROUPS.label_columns[0]
