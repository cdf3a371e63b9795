"""What a chat model is asked as a judge, and how its answer is read."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from dpo_fast.errors import UserError
from dpo_fast.judging.samples import SampleRow
from dpo_fast.wording import quoted

# The wording of both follows MT-Bench (arXiv 2306.05685, figures 5 and 6).
POINTWISE = """\
Please act as an impartial judge and evaluate the quality of the response that an AI assistant gave to \
the conversation below. Consider helpfulness, relevance, accuracy, depth and clarity. The length of the \
response shall not influence you. Begin with a short explanation. Then rate the response on a scale of 1 \
to 10 by strictly following this format: "[[rating]]", for example: "Rating: [[5]]".

[The conversation]
{prompt}

[The start of the response]
{completion}
[The end of the response]"""
PAIRWISE = """\
Please act as an impartial judge and evaluate which of two AI assistants answered the conversation below \
better. Consider helpfulness, relevance, accuracy, depth and clarity. Neither the order nor the length of \
the answers shall influence you. Begin with a short explanation. Then give your verdict by strictly \
following this format: "[[A]]" if assistant A is better, "[[B]]" if assistant B is better, and "[[C]]" for \
a tie.

[The conversation]
{prompt}

[The start of assistant A's answer]
{first}
[The end of assistant A's answer]

[The start of assistant B's answer]
{second}
[The end of assistant B's answer]"""
FIELDS = {"pointwise": ("prompt", "completion"), "pairwise": ("prompt", "first", "second")}
NEEDED = {"pointwise": ("completion",), "pairwise": ("first", "second")}
NUMBER = r"-?\d+(?:\.\d+)?"
MARKED_NUMBER = re.compile(rf"\[\[\s*({NUMBER})(?:\s*/\s*\d+)?\s*\]\]")
MARKED_WINNER = re.compile(r"\[\[\s*(A|B|C|tie)\s*\]\]", re.IGNORECASE)
FENCE = re.compile(r"```(?:json)?\s*(\{.*\})\s*```|(\{.*\})\s*\Z", re.DOTALL)
TIE = "C"
PLACE = re.compile(r"(?<!\{)\{([A-Za-z_]\w*)\}(?!\})")  # not {{...}}, nor an object of JSON


class Rubric:
    """A prompt with places for a row's texts.

    text: the prompt, or file:PATH; None: the default of this kind.

    Raises:
        UserError: the file cannot be read, or the places are not those of this kind.
    """

    def __init__(self, text: str | None, compare: str) -> None:
        self.compare = compare
        self.text = {"pointwise": POINTWISE, "pairwise": PAIRWISE}[compare]
        self.scale = (1, 10) if text is None else None
        if text is not None:
            self.text = _read(text)
            self._check()
        self._places = re.compile("|".join(rf"\{{{name}\}}" for name in FIELDS[compare]))

    def filled(self, row: SampleRow, **texts: str) -> str:
        """The prompt with the row's conversation, and texts by the names of their places."""
        values = {"prompt": conversation(row)} | texts
        # One pass: braces within the texts stay as they are.
        return self._places.sub(lambda match: values[match[0][1:-1]], self.text)

    def score_of(self, answer: str) -> float:
        """The score of an answer. Raises ValueError for none, and for one off the scale of the default."""
        score = score_of(answer)
        if self.scale and not self.scale[0] <= score <= self.scale[1]:
            raise ValueError(f"{score:g} is no rating from {self.scale[0]} to {self.scale[1]}")
        return score

    def _check(self) -> None:
        for name in NEEDED[self.compare]:
            if f"{{{name}}}" not in self.text:
                raise UserError(
                    f"judge.rubric has no {{{name}}}: judge.compare={self.compare} needs it where the "
                    "answer shall stand"
                )
        known = FIELDS[self.compare]
        for name in PLACE.findall(self.text):
            if name not in known:
                places = ", ".join(f"{{{each}}}" for each in known)
                raise UserError(
                    f"judge.rubric has {{{name}}}, and judge.compare={self.compare} fills in {places}: "
                    "correct the name, or write it without braces"
                )


def _read(text: str) -> str:
    if not text.startswith("file:"):
        return text
    path = Path(os.path.expanduser(text.removeprefix("file:")))
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"judge.rubric={text} cannot be read: {reason}") from None


def conversation(row: SampleRow) -> str:
    """A prompt as a judge reads it: the question alone, or all turns with who speaks."""
    messages = row.messages
    if len(messages) == 1:
        return _content(messages[0])
    return "\n\n".join(
        f"{message['role'].capitalize()}: {_content(message)}" for message in messages
    )


def _content(message: dict[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return content
    return json.dumps(content if content is not None else message, ensure_ascii=False)


def after_thinking(answer: str) -> str:
    """What an answer says once it has thought: numbers that it thought of are no verdict."""
    thought, end, said = answer.rpartition("</think>")
    return said if end else answer.partition("<think>")[0]


def score_of(answer: str) -> float:
    """The last [[7]], or {"score": 7}, or an answer that is a number. Raises ValueError."""
    if marks := MARKED_NUMBER.findall(answer):
        return float(marks[-1])
    value = _field(answer, "score")
    if isinstance(value, (int, float)) or re.fullmatch(NUMBER, str(value).strip()):
        return float(value)
    if re.fullmatch(NUMBER, answer.strip()):
        return float(answer)
    raise ValueError(f"{quoted(answer[-120:])} holds no [[number]]")


def winner_of(answer: str) -> str:
    """A, B or C for a tie: the last [[A]], or {"winner": "A"}, or an answer of that alone.

    Raises:
        ValueError: there is none.
    """
    marks = MARKED_WINNER.findall(answer)
    word = marks[-1] if marks else _field(answer, "winner") or answer.strip().strip(".")
    letter = {"TIE": TIE}.get(str(word).upper(), str(word).upper())
    if letter not in ("A", "B", "C"):
        raise ValueError(f"{quoted(answer[-120:])} holds no [[A]], [[B]] or [[C]]")
    return letter


def _field(answer: str, name: str) -> Any:
    """The value of a field of an answer that is, or ends with, an object of JSON."""
    found, value = FENCE.search(answer), None
    # An object at the end may have words in braces before it.
    for text in (found[1] or found[2], answer[answer.rfind("{") :]) if found else ():
        try:
            value = json.loads(text)
            break
        except (ValueError, RecursionError):
            continue
    value = value.get(name) if isinstance(value, dict) else None
    return None if isinstance(value, bool) else value
