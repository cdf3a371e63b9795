"""An answer of several turns: the messages of users and tools in it, and what the assistant wrote.

The assistant writes a turn after that turn's generation prompt. The last one goes on from it as any
answer does (`continuation.py`). Of an earlier one counts what the conversation still has of it:

    the conversation has                           scored
    all that the finished turn had                 the turn, up to and with its end
    not the empty thinking of a finished turn      what it has in place of it (Qwen 3)
    another end of turn, as generation never has   the turn without its end (gpt-oss: <|end|>)
    not its thinking                               nothing: the model would not answer like that
    other thinking of turns before it              the turn, in that context (Qwen 3.5)

A template that writes an earlier turn in yet another way is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from dpo_fast.data.continuation import PROBE, Continuation, Template, common
from dpo_fast.data.dialects import WRITTEN, Dialect
from dpo_fast.data.messages import WEIGHTS, Messages
from dpo_fast.data.thinking import (
    find_opening,
    skip_empty_thought,
    thinks,
    without_empty_thought,
    without_thought,
)
from dpo_fast.data.verdicts import BadRow

Render = Callable[..., str]  # messages and `generate` to text


class Turn(NamedTuple):
    """Characters of a text that the assistant wrote in one turn. Its end of turn may come after `stop`.

    place: of its message in the answer.
    """

    start: int
    stop: int
    place: int


@dataclass(frozen=True)
class Text:
    """A whole text, which begins with the prompt.

    answer: the messages that must be in it, without thinking that the template leaves out.
    scored: whether what follows the prompt is scored, but for `turns`, where it is the other way round.
    left_out: turns that are not scored because their thinking is left out.
    """

    whole: str
    answer: Messages
    scored: bool = True
    turns: tuple[Turn, ...] = ()
    left_out: int = 0

    def begun(self, prompt: str, whole: str) -> Text:
        """The text as it continues the prompt. Nothing but its beginning is new."""
        moved = len(whole) - len(self.whole)
        turns = [Turn(max(a + moved, len(prompt)), b + moved, at) for a, b, at in self.turns]
        return replace(self, whole=whole, turns=tuple(turns))


def until_assistant(answer: Messages) -> Messages:
    """The answer up to its last turn of the assistant."""
    return answer[: max(_places(answer), default=-1) + 1]


def has_unscored(answer: Messages, scored: str) -> bool:
    """Whether some of the answer is not to be scored: headers, if nothing else."""
    every = len(scored_places(answer, scored)) == len(_places(answer))
    return len(answer) > 1 and not (scored == "all" and every)


def scored_places(answer: Messages, scored: str) -> list[int]:
    """Indices of the assistant's messages that are to be scored. scored: the option of data."""
    places = _places(answer)[-1:] if scored == "last" else _places(answer)
    return [place for place in places if all(answer[place].get(key) != 0 for key in WEIGHTS)]


def check_scored(answer: Messages, field: str, scored: str) -> None:
    """Raises BadRow for weights that cannot be honoured, and if no message is to be scored."""
    for index, message in enumerate(answer):
        for key in WEIGHTS:
            if key in message:
                _check_weight(message, key, f"{field}[{index}]", scored)
    if not scored_places(answer, scored):
        last = "the last" if scored == "last" else "every"
        raise BadRow(f"nothing of {field} is scored", f"{last} assistant message has the weight 0")


def _check_weight(message: dict[str, Any], key: str, name: str, scored: str) -> None:
    weight = message[key]
    if weight not in (0, 1):
        raise BadRow(
            f"{key} of a message is not 0 or 1",
            f"{name}.{key} is {weight!r}: a message is scored or it is not. The column 'weight' weighs "
            "a row",
        )
    others = scored == "all"  # whether messages that are not the assistant's are scored
    if message["role"] != "assistant" and weight != others:
        raise BadRow(
            f"{key} of a {message['role']} message",
            f"{name}.{key} is {weight!r}, but with data.scored={scored} such messages are "
            f"{'' if others else 'not '}scored; leave it out",
        )


def _places(answer: Messages) -> list[int]:
    return [index for index, message in enumerate(answer) if message["role"] == "assistant"]


@dataclass(frozen=True)
class Trajectory:
    """An answer that ends with an assistant's turn and has other messages before it.

    field: its name. answer: as the row has it. dialect: that of the template.
    render: renders the prompt's messages and those that it is given.
    """

    field: str
    answer: Messages
    dialect: Dialect
    render: Render
    template: Template

    def text(self, scored: str) -> Text:
        """The conversation, beginning with the last turn's generation prompt. scored: as in data.

        Raises BadRow.
        """
        answer, wanted = self.answer, scored_places(self.answer, scored)
        named = wanted
        if scored == "all":
            named = [place for place in _places(answer) if place not in wanted]
        whole, last = self._whole()
        end = len(answer) - 1
        found = {p: self._find(whole, p) if p < end else (last, True) for p in named}
        left_out = [p for p, (_, complete) in found.items() if p in wanted and not complete]
        kept = [p for p in wanted if p not in left_out]
        return Text(
            whole,
            [m if p in kept else without_thought(m) for p, m in enumerate(answer)],
            scored == "all",
            tuple(turn for p, (turn, _) in found.items() if p not in left_out),
            len(left_out),
        )

    def _whole(self) -> tuple[str, Turn]:
        """The conversation, and its last turn."""
        place = len(self.answer) - 1
        turn, last = self._turn(place), self.answer[place:]
        turn.check_thinking({self.field: last})
        text = self.render(self._before(place + 1))
        if self.dialect.thinking == WRITTEN:
            text = turn.written(text, last, self.field) or text
        prompt, (text,) = turn.continued({self.field: text})
        return text, Turn(len(prompt), len(text), place)

    def _turn(self, place: int) -> Continuation:
        before = self._before(place)
        prompt = self.render(before, generate=True)
        return Continuation(
            prompt, self.template, lambda word: self.render([*before, _assistant(word)])
        )

    def _find(self, text: str, place: int) -> tuple[Turn, bool]:
        """An earlier turn in the text, and whether its thinking is there. Raises BadRow.

        place: of its message in the answer.
        """
        turn, message = self._turn(place), self.answer[place]
        start = self._begin(text, turn.prompt)
        start = self._after_header(text, place) if start is None else start
        forms = [self._finished(turn, place, message)]
        if thinks(message):
            plain = self._finished(turn, place, without_thought(message))
            forms = [None if forms == [plain] else forms[0], plain]
        for left_out, finished in enumerate(forms):
            if start is None or finished is None:
                continue
            size = self._agree(text[start:], finished, turn.opening is not None)
            if size is not None:
                return Turn(start, start + size, place), not left_out
        raise BadRow(
            "the chat template renders an earlier turn in another way once later ones follow",
            f"{self.field}[{place}] ({self.template.name}); use a template that renders it the same way "
            "(data.chat_template), or set data.scored=all, or give the message the weight 0",
        )

    def _finished(self, turn: Continuation, place: int, message: dict[str, Any]) -> str | None:
        """What the assistant would write in a turn that is the last; None if that cannot be told."""
        text = self.render([*self._before(place), *self.dialect.answer([message])])
        try:
            prompt, (text,) = turn.continued({self.field: text})
        except BadRow:
            return None
        return text[len(prompt) :]

    def _before(self, place: int) -> Messages:
        return self.dialect.answer(self.answer[:place])

    def _begin(self, text: str, prompt: str) -> int | None:
        """Where a text goes on after a generation prompt; None if it does not begin with it."""
        opening, header = find_opening(prompt), self.template.header
        base = len(opening.base) if opening else len(prompt)
        start = common(text, prompt)
        if start < len(prompt[:base].rstrip()):
            return None
        if opening and base <= start < len(prompt):
            if opening.closed or start < base + len(opening.open):
                start = base
            if opening.closed:
                start = len(text) - len(without_empty_thought(text[start:], opening))
        if not prompt.endswith(header) and text.startswith(header, start):
            start += len(header)
        return start

    def _after_header(self, text: str, place: int) -> int | None:
        """Where a turn begins whose context is new: the thinking of turns before it has gone.

        It is found by a word in its place. None if that word is not written, or after another context.
        """
        before, header = self._before(len(self.answer) - 1), self.template.header
        before[place] = before[place] | self.dialect.answer([_assistant(PROBE)])[0]
        found = self.render(before, generate=True).partition(PROBE)
        opening = find_opening(header)
        base = opening.base if opening else header
        start = found[0].rfind(base) + len(base)
        if not (found[1] and base in found[0] and text.startswith(found[0][:start])):
            return None
        if opening and opening.closed:
            start = len(text) - len(without_empty_thought(text[start:], opening))
        return start

    def _agree(self, rest: str, finished: str, opened: bool) -> int | None:
        """How much of a finished turn the conversation has; None if not all of it but its end.

        opened: the generation prompt opens thinking.
        """
        end = self.template.after_answer(None)
        forms = [(0, finished)]
        answer = skip_empty_thought(finished, opened)
        if answer != finished:  # white space after it may have been stripped off
            forms.append((len(rest) - len(rest.lstrip()), answer.lstrip()))
        for space, turn in forms:
            size = common(rest[space:], turn)
            if not turn[size:].strip():
                return space + size
            if end and turn.endswith(end) and size >= len(turn) - len(end):
                return space + len(turn) - len(end)
        return None


def _assistant(content: str) -> dict[str, Any]:
    return {"role": "assistant", "content": content}
