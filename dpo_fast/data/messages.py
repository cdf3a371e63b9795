"""Chat messages in the forms that people write them, as messages of `role` and `content`.

{"from": "human", "value": "q"}                         ShareGPT; gpt, function_call, observation, ...
{"role": "user", "content": [{"type": "text", "text": "q"}]}      text in parts
{"role": "tool_call", "content": '{"name": ..., "arguments": ...}'}     ms-swift
{"human": "q", "assistant": "a"}                        a question with its answer
{"role": ["user", "assistant"], "content": ["q", "a"]}  columns, as older `datasets` store lists
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from dpo_fast.data.json_text import Refused, decode
from dpo_fast.data.plain import from_json, plain
from dpo_fast.data.verdicts import BadRow, Dropped

Messages = list[dict[str, Any]]
ROLES = ("system", "developer", "user", "assistant", "tool")
OTHER_ROLES = {
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model"), "assistant"),
    **dict.fromkeys(("ai", "bot", "chatbot"), "assistant"),
    **dict.fromkeys(("observation", "tool_response", "function", "function_response"), "tool"),
    **dict.fromkeys(("ipython", "tool_result", "tool_results"), "tool"),
}
CALLS = ("function_call", "tool_call", "tool_calls")  # roles whose content is the call
# Whether a message is scored; by OpenAI and Mistral, by ms-swift, and by Axolotl.
WEIGHTS = ("weight", "loss", "train", "training")
ANSWERS = ("chosen", "rejected", "completion")  # what fields of answers begin with
PLAIN = {"role", "content"}  # the keys of most messages
PRINTED = re.compile(r"\s*\[?\s*\{\s*'(?:role|content|from|value)'\s*:")
TEXT_PARTS = ("text", "input_text", "output_text")


def check_messages(value: Any, field: str) -> Messages:
    """`value` as clean messages: known roles, text contents, no nulls. Raises BadRow naming `field[i]`."""
    if isinstance(value, Mapping):
        value = _from_columns(value)
    if not value:
        verdict = Dropped if field.startswith(ANSWERS) else BadRow
        raise verdict(f"empty {field}", "the message list has no messages")
    checked: Messages = []
    for index, item in enumerate(value):
        messages = _checked(item, f"{field}[{index}]")
        if checked and checked[-1]["role"] == "assistant" and _is_call(item):
            _add_calls(checked[-1], messages[0], f"{field}[{index}]")
        else:
            checked += messages
    return checked


def _add_calls(turn: dict[str, Any], calls: dict[str, Any], name: str) -> None:
    """Adds calls to the turn that they are of: it says something first, or calls other tools too."""
    for key in WEIGHTS:
        if calls.get(key) != turn.get(key):
            raise BadRow(
                f"one turn with two values of {key}",
                f"{name} is a call of the turn before it: give both the same {key}",
            )
    turn["tool_calls"] = [*turn.get("tool_calls", ()), *calls["tool_calls"]]


def are_messages(value: Any) -> bool:
    """Whether it is a list of messages."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(item, Mapping) and {"role", "from"} & set(item) for item in value)
    )


def from_text(value: str) -> Any:
    """The list or the object that a text is JSON of, as in CSV; None for any other text.

    Raises BadRow for messages that could be read in two ways.
    """
    if value.lstrip()[:1] not in ("[", "{"):
        return None
    try:
        return decode(value)
    except Refused as error:
        if _says_messages(value):
            raise BadRow("messages that are no sound JSON", str(error)) from None
        return None
    except ValueError:
        return None


def _says_messages(value: str) -> bool:
    """Whether JSON that is refused holds messages; other text may be what it likes."""
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return False
    return are_messages(found if isinstance(found, list) else [found])


def messages_in(value: str) -> list | Mapping | None:
    """The messages, or the one, that a text is JSON of; None for any other text."""
    found = from_text(value)
    keys = found.keys() if isinstance(found, Mapping) else ()
    one = {"role", "content"} <= set(keys) or {"from", "value"} <= set(keys)
    return found if one or are_messages(found) else None


def check_not_python(value: str, field: str) -> None:
    """Raises BadRow for messages as Python prints them, which pandas writes into CSV."""
    if PRINTED.match(value):
        raise BadRow(
            f"field {field!r} is not JSON",
            "it is messages as Python prints them. Write them with json.dumps, or the table as Parquet "
            "or JSON Lines",
        )


def say(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def _from_columns(value: Mapping[str, Any]) -> list[Any]:
    """A message, or messages as a list for each key."""
    roles = value.get("role", value.get("from"))
    if not isinstance(roles, list):
        return [value]
    lists = {key: items for key, items in value.items() if isinstance(items, list)}
    return [
        {key: items[index] for key, items in lists.items() if index < len(items)}
        for index in range(len(roles))
    ]


def _checked(item: Any, name: str) -> Messages:
    """The message, or the question and the answer, of one item."""
    if type(item) is dict and item.keys() == PLAIN and item["role"] in ROLES and item["content"]:
        return [_finished(dict(item), name)]  # as nearly all are
    if not isinstance(item, Mapping):
        raise BadRow("not a message", f"{name}: expected an object, got {type(item).__name__}")
    message = plain(item)
    question = next((key for key in ("human", "user") if key in message), None)
    if question and "assistant" in message and "role" not in message:
        pairs = (("user", question), ("assistant", "assistant"))
        return [_finished(say(role, message[key]), name) for role, key in pairs]
    for ours, theirs in (("role", "from"), ("content", "value")):
        if ours not in message and theirs in message:
            message[ours] = message.pop(theirs)
    if "role" not in message:
        raise BadRow("message without role", f"{name} has {', '.join(map(repr, message))}")
    if _is_call(message):
        return [_calls(message, name)]
    given = str(message["role"])
    message["role"] = role = OTHER_ROLES.get(given.lower(), given.lower())
    if role not in ROLES:
        raise BadRow(f"unknown role {given!r}", f"{name}.role: expected {', '.join(ROLES)}")
    return [_finished({"role": role, **message}, name)]


def _is_call(item: Mapping[str, Any]) -> bool:
    return str(item.get("role", item.get("from"))).lower() in CALLS


def _finished(message: dict[str, Any], name: str) -> dict[str, Any]:
    """The message with text for content and a list for tool calls, if there are any."""
    if isinstance(message.get("tool_calls"), str):
        message["tool_calls"] = from_json(message["tool_calls"], f"{name}.tool_calls")
    if "tool_calls" in message and not message["tool_calls"]:
        del message["tool_calls"]  # as servers answer; a template may count them
    _check_calls(message.get("tool_calls", []), f"{name}.tool_calls")
    if "function_call" in message:  # before there were tools
        call = {"type": "function", "function": message.pop("function_call")}
        message.setdefault("tool_calls", [call])
    if "content" not in message and message.get("tool_calls"):
        message["content"] = ""
    if isinstance(message.get("content"), list):
        parts = enumerate(message["content"])
        message["content"] = "".join(_text(part, f"{name}.content[{i}]") for i, part in parts)
    if not isinstance(message.get("content"), str):
        kind = type(message.get("content")).__name__
        raise BadRow("content is not text", f"{name}.content: expected text, got {kind}")
    try:
        message["content"].encode()
    except UnicodeEncodeError:
        raise BadRow("content is not Unicode text", f"{name} has a lone surrogate") from None
    return message


def _check_calls(calls: Any, name: str) -> None:
    """Raises BadRow unless it is a list of objects, whose functions are objects too."""
    listed = calls if isinstance(calls, list) else [None]
    if not all(isinstance(call, Mapping) for call in listed) or not all(
        isinstance(call.get("function", call), Mapping) for call in listed
    ):
        raise BadRow(
            "tool_calls are not calls", f"{name}: expected a list of objects with 'function'"
        )


def _text(part: Any, name: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
    if kind not in TEXT_PARTS:
        raise BadRow(
            f"content has a part of type {kind!r}",
            f"{name}: expected text, or an image; others are not trained on",
        )
    if not isinstance(part.get("text"), str):
        hint = "; one that is an image has type 'image'" if "image" in part else ""
        raise BadRow("a part without text", f"{name} has {', '.join(map(repr, part))}{hint}")
    return part["text"]


def _calls(message: dict[str, Any], name: str) -> dict[str, Any]:
    """A message whose content is a call of a tool, or a list of them."""
    calls = message.get("content")
    calls = from_json(calls, name) if isinstance(calls, str) else calls
    calls = calls if isinstance(calls, list) else [calls]
    for call in calls:
        if not isinstance(call, Mapping) or not {"name", "function"} & set(call):
            raise BadRow(
                "a call without a name", f"{name}: expected an object with 'name' and 'arguments'"
            )
    whole = [
        call if "function" in call else {"type": "function", "function": call} for call in calls
    ]
    weight = {key: message[key] for key in WEIGHTS if key in message}
    return {"role": "assistant", "content": "", "tool_calls": whole, **weight}
