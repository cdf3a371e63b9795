"""Thinking: the part of an answer that a reasoning model writes before what it says."""

from __future__ import annotations

import re
from typing import NamedTuple

# What opens and what closes thinking, family by family.
MARKS = (
    ("<think>", "</think>"),  # Qwen, DeepSeek, GLM, Nemotron, SmolLM3, LFM2
    ("[THINK]", "[/THINK]"),  # Mistral
    ("◁think▷", "◁/think▷"),  # Kimi-VL
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Cohere
    ("<|channel>thought\n", "<channel|>"),  # Gemma 4
    ("<seed:think>", "</seed:think>"),  # Seed
    ("<mm:think>", "</mm:think>"),  # MiniMax M3
)
ENDS = {close[-1] for _, close in MARKS}
# Fields of a message that templates take thinking from.
KEYS = ("reasoning_content", "reasoning", "thinking")
SWITCHES = ("enable_thinking", "thinking")


class Thought(NamedTuple):
    """Thinking of one message, and the content without it.

    inside: between the marks, with its white space. gap: white space after the closing mark.
    key: the field of the message that had it; None if it was in the content.
    """

    open: str
    inside: str
    close: str
    gap: str
    rest: str
    key: str | None = None


def find_thought(message: dict) -> Thought | None:
    """The thinking of an assistant's message, in a field of its own or in the content.

    The opening mark may be missing: answers that were sampled after a generation prompt that opens
    the thinking have none. Messages of others do not think.
    """
    if message["role"] != "assistant":
        return None
    content = message["content"] if isinstance(message.get("content"), str) else ""
    for key in KEYS:
        if isinstance(message.get(key), str) and message[key].strip():
            return Thought(*MARKS[0][:1], f"\n{message[key]}\n", MARKS[0][1], "\n\n", content, key)
    if not any(end in content for end in ENDS):
        return None  # most contents
    for opening, close in MARKS:
        before, found, after = content.partition(close)
        if found:
            inside = before.lstrip().removeprefix(opening)
            rest = after.lstrip()
            return Thought(opening, inside, close, after[: len(after) - len(rest)], rest)
    return None


def never_closed(message: dict, template: str) -> bool:
    """Whether its content is thinking that does not end, and the template knows thinking.

    Such a template would write it as what is said after empty thinking.
    """
    content = message.get("content")
    words = content.lstrip() if message["role"] == "assistant" and isinstance(content, str) else ""
    return any(
        words.startswith(opening.rstrip())
        and close not in words
        and any(word in template for word in (opening.rstrip(), close, *KEYS))
        for opening, close in MARKS
    )


def thinks(message: dict) -> bool:
    """Whether there are words in its thinking."""
    thought = find_thought(message)
    return thought is not None and bool(thought.inside.strip())


def without_thought(message: dict) -> dict:
    """The message as if it did not think."""
    thought = find_thought(message)
    if thought is None:
        return message
    plain = {key: value for key, value in message.items() if key not in KEYS}
    return plain | {"content": thought.rest}


class Opening(NamedTuple):
    """Thinking marks at the end of a generation prompt.

    base: the prompt before them. gap: white space at the end.
    closed: the thinking is over, and so none is wanted.
    """

    base: str
    open: str
    close: str
    gap: str
    closed: bool


def find_opening(prompt: str) -> Opening | None:
    """The marks with which a generation prompt begins the answer's thinking, if it does."""
    words = prompt.rstrip()
    for opening, close in MARKS:
        if not words.endswith((opening.rstrip(), close)):
            continue
        begun, ended = re.escape(opening), re.escape(close)
        found = re.search(rf"{begun}(\s*)$", prompt)
        closed = re.search(rf"(?:{begun}\s*)?{ended}(\s*)$", prompt)
        match = found or closed
        if match:
            return Opening(prompt[: match.start()], opening, close, match[1], found is None)
    return None


def without_empty_thought(text: str, opening: Opening) -> str:
    """The text without the empty thinking that it begins with."""
    begun, ended = re.escape(opening.open), re.escape(opening.close)
    return re.sub(rf"^(?:{begun}\s*)?{ended}\s*", "", text, count=1)


def skip_empty_thought(text: str, opened: bool) -> str:
    """The same for the text after any generation prompt. opened: it opens thinking."""
    for opening, close in MARKS:
        begun = rf"(?:{re.escape(opening)})" + "?" * opened
        empty = re.match(rf"\s*{begun}\s*{re.escape(close)}\s*", text)
        if empty:
            return text[empty.end() :]
    return text


def continue_thought(prompt: str, rest: str, opening: Opening) -> str | None:
    """`rest`, which follows opening.base in a finished turn, as it follows the prompt.

    None if it does not think and does not close the thinking either.
    """
    if rest.startswith(opening.close):
        return prompt + rest
    if opening.open not in rest and opening.close in rest:
        return prompt + rest.removeprefix(opening.gap)
    if not rest.startswith(opening.open):
        return None
    inside = rest.removeprefix(opening.open)
    return prompt + inside.removeprefix(opening.gap)


def write_thought(prompt: str, rest: str, thought: Thought, opening: Opening | None) -> str | None:
    """An answer whose thinking the template leaves out, after the prompt, with its thinking.

    rest: the finished turn after the prompt, or after opening.base. None if it has no place for thinking
    that came in a field of its own: the generation prompt does not open it, and the turn does not begin
    with empty thinking.
    """
    if opening is None:
        empty = re.match(rf"({re.escape(thought.open)})\s*({re.escape(thought.close)})", rest)
        if empty is None:
            if thought.key or rest[:1].strip() != thought.rest[:1]:
                return None
            return prompt + thought.open + thought.inside + thought.close + thought.gap + rest
        inside = thought.inside.strip() if thought.key else thought.inside
        gap = "" if thought.key else thought.gap
        return prompt + empty[1] + inside + empty[2] + gap + rest[empty.end() :]
    answer, inside, gap = without_empty_thought(rest, opening), thought.inside, thought.gap
    if thought.key:  # the prompt shows how the family sets thinking apart
        line = "\n" if "\n" in opening.gap else ""
        inside, gap = opening.gap + inside.strip() + line, line * 2
    inside = inside.removeprefix(opening.gap) if inside.startswith(opening.gap) else inside.lstrip()
    return prompt + inside + opening.close + gap + answer
