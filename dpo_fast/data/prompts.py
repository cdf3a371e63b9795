"""Prompt and answers: what two whole texts or conversations share, and what an answer may hold."""

from __future__ import annotations

import os.path
from collections.abc import Mapping
from typing import Any

from dpo_fast.data.config import DataConfig
from dpo_fast.data.messages import Messages, say
from dpo_fast.data.verdicts import BadRow, Dropped

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


def split_texts(chosen: str, rejected: str, marker: str | None) -> tuple[str, str, str]:
    """(prompt, chosen, rejected) of two texts that begin with the same prompt. Raises BadRow.

    With a marker the prompt of each text ends with its last marker, and the two prompts must be the
    same. Dialogues of Human: and Assistant: turns bring their marker. Without a marker the prompt is
    the longest common beginning, cut back to the end of a word:

    >>> split_texts("2 + 2 is four.", "2 + 2 is five.", None)
    ('2 + 2 is', ' four.', ' five.')
    """
    if marker is None and is_dialogue(chosen):
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


def is_dialogue(answer: str | Messages) -> bool:
    """Whether it is a text of Human: and Assistant: turns, which tells where its prompt ends."""
    return isinstance(answer, str) and HUMAN in answer and ASSISTANT in answer


def _common_words(chosen: str, rejected: str) -> int:
    """Where the common beginning ends, on a word boundary; 0 if no word is common.

    One space stays with the answer, since most tokenizers join it to the word that follows.
    """
    common = os.path.commonprefix([chosen, rejected])
    end = next((i for i in range(len(common), 0, -1) if common[i - 1].isspace()), 0)
    if end and common[end - 1] == " ":
        end -= 1
    return end if common[:end].strip() else 0


def without_prompt(prompt: str, answers: list[str]) -> list[str]:
    """Texts that follow the prompt. Answers that are whole texts repeat it; it is taken off.

    They do if all of them begin with it and it has several words: "Hi" may well be answered with "Hi".
    """
    whole = len(prompt.split()) > 1 and all(answer.startswith(prompt) for answer in answers)
    return [answer[len(prompt) :] for answer in answers] if whole else answers


def check_answer(messages: Messages, field: str) -> None:
    """Raises BadRow unless the assistant begins, and Dropped where it says nothing."""
    if messages[0]["role"] != "assistant":
        raise BadRow(
            f"{field} begins with a {messages[0]['role']} message",
            "an answer begins with what the assistant wrote; what comes before it belongs to the prompt, "
            "which all answers share",
        )
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if not message["content"].strip() and not message.get("tool_calls"):
            raise Dropped(f"empty {field}", f"message {index} of the answer has no text")


def split_conversations(chosen: Messages, rejected: Messages) -> tuple[Messages, ...]:
    """(prompt, chosen, rejected) of two conversations; the prompt is their shared beginning.

    The prompt never ends with an assistant message: such messages go back to both answers. It is empty
    for conversations that the assistant begins. Raises BadRow when the user's first messages differ, or
    when a conversation ends within the shared part.
    """
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    while shared and chosen[shared - 1]["role"] == "assistant":
        shared -= 1
    if not shared and not chosen[0]["role"] == rejected[0]["role"] == "assistant":
        raise BadRow("no common prompt", "chosen and rejected share no leading messages")
    for field, messages in (("chosen", chosen), ("rejected", rejected)):
        if len(messages) == shared:
            raise Dropped(f"empty {field}", "no message follows the shared prompt")
    return chosen[:shared], chosen[shared:], rejected[shared:]


def split_conversation(messages: Messages) -> tuple[Messages, Messages]:
    """A conversation before the assistant's first turn, and from it on. Raises BadRow without one."""
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise BadRow("no answer", f"the conversation has no message of the assistant: {roles}")
    first = roles.index("assistant")
    return messages[:first], messages[first:]


def joined(
    prompt: str | Messages, completions: list[str] | list[Messages]
) -> tuple[str | Messages, list[str] | list[Messages]]:
    """(prompt, completions), all of them messages if one is."""
    texts = isinstance(completions[0], str)
    if texts and isinstance(prompt, str):
        return prompt, without_prompt(prompt, completions)
    prompt = _from_user(prompt) if isinstance(prompt, str) else prompt
    if texts:
        return prompt, [[say("assistant", each)] for each in completions]
    size = len(prompt)
    if prompt and all(len(each) > size and each[:size] == prompt for each in completions):
        completions = [each[size:] for each in completions]  # whole conversations
    return prompt, completions


def with_prompt(
    prompt: str | Messages, chosen: str | Messages, rejected: str | Messages
) -> tuple[str | Messages, ...]:
    """(prompt, chosen, rejected) of a pair with a prompt column, all text or all messages.

    Answers that are whole conversations repeat the prompt; it is taken off. Raises BadRow.
    """
    texts = isinstance(chosen, str)
    if texts or chosen[0]["role"] == rejected[0]["role"] == "assistant":
        prompt, (chosen, rejected) = joined(prompt, [chosen, rejected])
        return prompt, chosen, rejected
    shared, chosen, rejected = split_conversations(chosen, rejected)
    if prompt and not repeats(prompt, shared):
        raise BadRow(
            "chosen and rejected do not begin with the prompt",
            "they are whole conversations, so their shared beginning must be the prompt",
        )
    return shared, chosen, rejected


def repeats(prompt: str | Messages, shared: Messages) -> bool:
    """Whether the shared beginning of two conversations is what the prompt column says."""
    if isinstance(prompt, str):
        users = [message["content"] for message in shared if message["role"] == "user"]
        return prompt.strip() in [content.strip() for content in users]
    return shared[: len(prompt)] == prompt


def _from_user(prompt: str) -> Messages:
    """The prompt as the user's message; no message if it is empty."""
    return [say("user", prompt)] if prompt.strip() else []


def as_chat(
    prompt: str | Messages, answers: list[Any], row: Mapping[str, Any], config: DataConfig
) -> tuple[str | Messages, list[Any]]:
    """Texts as messages, if data.apply_chat_template says so. Raises BadRow without a prompt column."""
    if not isinstance(prompt, str) or config.apply_chat_template is not True:
        return prompt, answers
    if row.get("prompt") is None:
        raise BadRow(
            "no prompt column",
            "data.apply_chat_template=true makes it the user's message, and where it ends in whole texts "
            "is not told: name it with data.columns.prompt, or set data.format=hh for dialogues of Human: "
            "and Assistant: turns",
        )
    user = [say("user", prompt)] if prompt else []
    return user, [[say("assistant", each)] for each in answers]
