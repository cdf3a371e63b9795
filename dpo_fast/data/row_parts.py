"""What rows of all kinds have: a prompt as it is read, a system message, texts that are not empty."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dpo_fast.data import values
from dpo_fast.data.config import CHAT_COLUMNS
from dpo_fast.data.messages import Messages, say
from dpo_fast.data.prompts import check_answer
from dpo_fast.data.verdicts import BadRow, Dropped


def read_prompt(value: Any) -> str | Messages:
    """The prompt, which may be an empty list."""
    return [] if isinstance(value, list) and not value else values.text_or_messages(value, "prompt")


def with_system(prompt: str | Messages, row: Mapping[str, Any]) -> str | Messages:
    """The prompt with the column `system` for its first message."""
    system = row.get("system")
    if isinstance(prompt, str) or system is None or system == "":
        return prompt
    if not isinstance(system, str):
        raise BadRow("field 'system' is not text", f"got {type(system).__name__}")
    if prompt and prompt[0]["role"] in ("system", "developer"):
        if prompt[0]["content"].strip() != system.strip():
            raise BadRow("two system messages", "the column 'system' and the first message differ")
        return prompt
    return [say("system", system), *prompt] if system.strip() else prompt


def check_texts(prompt: str | Messages, answers: dict[str, str | Messages]) -> None:
    if isinstance(prompt, str):
        texts = {"prompt": prompt, **answers} if prompt else answers
        for name, text in texts.items():
            if not text.strip():
                verdict = BadRow if name == "prompt" else Dropped
                raise verdict(f"empty {name}", "expected text, got only white space")
        return
    last = prompt[-1] if prompt else None
    if last and last["role"] != "tool" and not last["content"].strip():
        raise BadRow("empty prompt", f"its last message ({last['role']}) has no text")
    for name, answer in answers.items():
        check_answer(answer, name)


def check_chat_columns(prompt: str | Messages, optional: dict[str, Any]) -> None:
    unused = [name for name in CHAT_COLUMNS if name in optional]
    if isinstance(prompt, str) and unused:
        raise BadRow(
            f"{unused[0]} without messages",
            "it needs a chat template, and the row is text; give messages, or list the column in "
            "data.ignore_columns",
        )
