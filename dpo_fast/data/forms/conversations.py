"""Rows that hold conversations: ShareGPT, ms-swift, OpenAI, the arena, dialogues written as one text."""

from __future__ import annotations

import re
from typing import Any

from dpo_fast.data.forms.fields import Raw, better, first
from dpo_fast.data.messages import Messages, check_messages, say
from dpo_fast.data.verdicts import BadRow

CONVERSATIONS = ("conversations", "messages", "conversation", "trajectory")
HUMAN = re.compile(r"\n\n(Human|Assistant): ?")
EXTRA_ID = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")  # HelpSteer2's


def sharegpt(row: Raw) -> Raw:
    """conversations (or messages), and chosen and rejected; or a label for the last answer."""
    name = next(name for name in CONVERSATIONS if row.get(name) is not None)
    messages = _messages(row.pop(name), name)
    if row.get("rejected") is not None:
        answers = {name: row.pop(name) for name in ("chosen", "rejected") if name in row}
        return {"prompt": messages, **answers}
    prompt, answer = _last_answer(messages, name)
    return {"prompt": prompt, "completion": answer, "label": row.pop("label")}


def demonstration(row: Raw) -> Raw:
    """conversations (or messages) alone: what the assistant says in them."""
    name = next(name for name in CONVERSATIONS if row.get(name) is not None)
    return {"completion": _messages(row.pop(name), name)}


def whole_text(row: Raw) -> Raw:
    """text, all of it."""
    value = row.pop("text")
    if not isinstance(value, str):
        raise BadRow("field 'text' is not text", f"got {type(value).__name__}")
    return {"prompt": "", "completion": value}


def swift(row: Raw) -> Raw:
    """messages that end with the chosen answer, and rejected_response or rejected_messages."""
    name = next(name for name in CONVERSATIONS if row.get(name) is not None)
    messages = _messages(row.pop(name), name)
    rejected = first(row, "rejected_messages")
    if rejected is not None:
        return {"chosen": messages, "rejected": rejected}
    prompt, answer = _last_answer(messages, name)
    rejected = row.pop("rejected_response")
    if isinstance(rejected, str):
        rejected = [say("assistant", rejected)]
    return {"prompt": prompt, "chosen": answer, "rejected": rejected}


def openai(row: Raw) -> Raw:
    """input with messages and perhaps tools, preferred_output and non_preferred_output."""
    given = row.pop("input")
    if not isinstance(given, dict) or given.get("messages") is None:
        raise BadRow("field 'input' has no messages", "expected an object with 'messages'")
    pair = {
        "prompt": given["messages"],
        "chosen": row.pop("preferred_output"),
        "rejected": row.pop("non_preferred_output"),
    }
    # The rest of it are settings of OpenAI's service, such as parallel_tool_calls.
    return pair | ({"tools": given["tools"]} if given.get("tools") else {})


def arena(row: Raw) -> Raw:
    """conversation_a, conversation_b and winner: model_a, model_b, or a tie."""
    winner = row.pop("winner")
    sides = {"model_a": -1, "model_b": 1}
    if (
        not isinstance(winner, str)
        or winner not in sides
        and not winner.startswith(("tie", "both"))
    ):
        raise BadRow("unknown winner", f"expected model_a, model_b or tie, got {winner!r}")
    first_, second = row.pop("conversation_a"), row.pop("conversation_b")
    return better(first_, second, sides.get(winner, 0), "winner")


def dialogues(row: Raw) -> Raw:
    """Texts of Human: and Assistant: turns (Anthropic's HH), as messages."""
    texts = {name: row.pop(name) for name in ("prompt", "chosen", "rejected") if name in row}
    first_ = next(iter(texts))
    if not isinstance(texts[first_], str) or not HUMAN.search("\n\n" + texts[first_]):
        raise BadRow(f"{first_} is not a dialogue", "it has no 'Human:' and 'Assistant:' turns")
    return {
        name: value if name != first_ and "prompt" in texts else turns(value)
        for name, value in texts.items()
    }


def turns(value: str, mark: re.Pattern[str] = HUMAN) -> Messages:
    """The turns of a text; all of it is the user's if it has no marks. A last empty turn is left out."""
    before, *parts = mark.split("\n\n" + value if mark is HUMAN else value)
    if not parts:
        return [say("user", value)]
    messages = [say("user", before.strip())] if before.strip() else []
    for role, content in zip(parts[::2], parts[1::2]):
        messages.append(say("assistant" if role == "Assistant" else "user", content.strip()))
    if not messages[-1]["content"]:
        messages.pop()
    return messages


def _messages(value: Any, name: str) -> Messages:
    if not isinstance(value, (list, dict)):
        raise BadRow(
            f"field {name!r} is not a list", f"expected messages, got {type(value).__name__}"
        )
    return check_messages(value, name)


def _last_answer(messages: Messages, name: str) -> tuple[Messages, Messages]:
    """The conversation before its last answer, and that answer. Raises BadRow."""
    end = len(messages)
    while end and messages[end - 1]["role"] == "assistant":
        end -= 1
    if end == len(messages):
        raise BadRow(f"{name} does not end with an answer", f"its last is {messages[-1]['role']}'s")
    return messages[:end], messages[end:]
