"""The prompt that two whole texts or two conversations share, and the checks of chat messages."""

from __future__ import annotations

import os.path
from collections.abc import Mapping
from typing import Any

from dpo_fast.data.verdicts import BadRow

Messages = list[dict[str, Any]]
ROLES = ("system", "user", "assistant", "tool")
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


def split_texts(chosen: str, rejected: str, marker: str | None) -> tuple[str, str, str]:
    """(prompt, chosen, rejected) of two texts that begin with the same prompt. Raises BadRow.

    With a marker the prompt of each text ends with its last marker, and the two prompts must be the
    same. Dialogues of Human: and Assistant: turns bring their marker. Without a marker the prompt is
    the longest common beginning, cut back to the end of a word:

    >>> split_texts("2 + 2 is four.", "2 + 2 is five.", None)
    ('2 + 2 is', ' four.', ' five.')
    """
    if marker is None and HUMAN in chosen and ASSISTANT in chosen:
        marker = ASSISTANT
    if marker is None:
        end = _common_words(chosen, rejected)
        return chosen[:end], chosen[end:], rejected[end:]
    for field, text in (("chosen", chosen), ("rejected", rejected)):
        if marker not in text:
            raise BadRow("no prompt marker", f"{field} does not contain {marker!r}")
    end = chosen.rfind(marker) + len(marker)
    if rejected.rfind(marker) + len(marker) != end or rejected[:end] != chosen[:end]:
        raise BadRow("no common prompt", f"the texts differ before their last {marker!r}")
    return chosen[:end], chosen[end:], rejected[end:]


def _common_words(chosen: str, rejected: str) -> int:
    """Where the common beginning ends, on a word boundary.

    One space stays with the answer, since most tokenizers join it to the word that follows.
    """
    common = os.path.commonprefix([chosen, rejected])
    end = next((i for i in range(len(common), 0, -1) if common[i - 1].isspace()), 0)
    if end and common[end - 1] == " ":
        end -= 1
    if not common[:end].strip():
        raise BadRow("no common prompt", "chosen and rejected do not begin with the same words")
    return end


def check_messages(value: list[Any], field: str) -> Messages:
    """`value` as clean messages: known roles, text contents. Raises BadRow naming `field[i]`.

    Keys whose value is null are left out: Arrow gives every message the keys of all others.
    """
    if not value:
        raise BadRow(f"empty {field}", "the message list has no messages")
    return [_checked(item, f"{field}[{index}]") for index, item in enumerate(value)]


def _checked(item: Any, name: str) -> dict[str, Any]:
    if not isinstance(item, Mapping):
        raise BadRow("not a message", f"{name}: expected an object, got {type(item).__name__}")
    message = {key: value for key, value in item.items() if value is not None}
    if "role" not in message:
        raise BadRow("message without role", f"{name} has {', '.join(map(repr, message))}")
    if message["role"] not in ROLES:
        raise BadRow(
            f"unknown role {message['role']!r}", f"{name}.role: expected {', '.join(ROLES)}"
        )
    if "content" not in message and message.get("tool_calls"):
        message["content"] = ""
    if not isinstance(message.get("content"), str):
        kind = type(item.get("content")).__name__
        raise BadRow("content is not text", f"{name}.content: expected text, got {kind}")
    try:
        message["content"].encode()
    except UnicodeEncodeError:
        raise BadRow("content is not Unicode text", f"{name} has a lone surrogate") from None
    return message


def check_answer(messages: Messages, field: str) -> None:
    """Raises BadRow unless all messages are the assistant's and have text or tool calls.

    Every token of an answer is scored, so turns the model did not write may not be part of it.
    """
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            raise BadRow(
                f"{field} holds a {message['role']} message",
                f"{field}[{index}] of the answer would be scored: an answer has only assistant "
                "messages, and earlier turns belong to the prompt",
            )
        if not message["content"].strip() and not message.get("tool_calls"):
            raise BadRow(f"empty {field}", f"message {index} of the answer has no text")


def split_conversations(chosen: Messages, rejected: Messages) -> tuple[Messages, ...]:
    """(prompt, chosen, rejected) of two conversations; the prompt is their shared beginning.

    The prompt never ends with an assistant message: such messages go back to both answers.
    Raises BadRow when nothing is shared, or when a conversation ends within the shared part.
    """
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    while shared and chosen[shared - 1]["role"] == "assistant":
        shared -= 1
    if not shared:
        raise BadRow("no common prompt", "chosen and rejected share no leading messages")
    for field, messages in (("chosen", chosen), ("rejected", rejected)):
        if len(messages) == shared:
            raise BadRow(f"empty {field}", "no message follows the shared prompt")
    return chosen[:shared], chosen[shared:], rejected[shared:]


def joined(
    prompt: str | Messages, completions: list[str] | list[Messages]
) -> tuple[str | Messages, list[str] | list[Messages]]:
    """(prompt, completions), all of them messages if one is."""
    if isinstance(completions[0], str) and not isinstance(prompt, str):
        return prompt, [_message("assistant", each) for each in completions]
    if isinstance(prompt, str) and not isinstance(completions[0], str):
        return _message("user", prompt), completions
    return prompt, completions


def with_prompt(
    prompt: str | Messages, chosen: str | Messages, rejected: str | Messages
) -> tuple[str | Messages, ...]:
    """(prompt, chosen, rejected) of a pair with a prompt column, all text or all messages.

    Answers that are whole conversations repeat the prompt; it is taken off. Raises BadRow.
    """
    if isinstance(chosen, str):
        if isinstance(prompt, str):
            return prompt, chosen, rejected
        return prompt, _message("assistant", chosen), _message("assistant", rejected)
    whole = chosen[0]["role"] != "assistant" or rejected[0]["role"] != "assistant"
    if not whole:
        return _message("user", prompt) if isinstance(prompt, str) else prompt, chosen, rejected
    shared, chosen, rejected = split_conversations(chosen, rejected)
    if not _repeats(prompt, shared):
        raise BadRow(
            "chosen and rejected do not begin with the prompt",
            "they are whole conversations, so their shared beginning must be the prompt",
        )
    return shared, chosen, rejected


def _repeats(prompt: str | Messages, shared: Messages) -> bool:
    """Whether the shared beginning of two conversations is what the prompt column says."""
    if isinstance(prompt, str):
        users = [message["content"] for message in shared if message["role"] == "user"]
        return prompt.strip() in [content.strip() for content in users]
    return shared == prompt


def _message(role: str, content: str) -> Messages:
    return [{"role": role, "content": content}]
