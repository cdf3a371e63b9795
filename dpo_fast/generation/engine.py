"""What all engines have: they take batches and give completions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from dpo_fast.generation.batches import Batch
from dpo_fast.generation.prompts import Prompt

STOP, LENGTH = "stop", "length"  # finish reasons, in the words of OpenAI


@dataclass(frozen=True)
class Completion:
    """One completion.

    text: without its end of turn and without the text that stopped it.
    finish_reason: stop, length, or another word of a server.
    ids: the tokens that were written, its end of turn too; None where a server does not say.
    """

    text: str
    finish_reason: str
    ids: Sequence[int] | None = None


@dataclass(frozen=True)
class Request:
    """A prompt as engines take it. ids: the tokens that a completion follows; stop_ids: that end one."""

    prompt: Prompt
    ids: Sequence[int]
    stop_ids: Sequence[int]


class TooLong(Exception):
    """A server has no room for a prompt. The message says why."""


class Engine(Protocol):
    """Writes completions. It may be used once."""

    def complete(
        self, batches: Iterable[Batch], requests: Sequence[Request]
    ) -> Iterator[tuple[Batch, list[Completion | TooLong]]]:
        """The completions of each batch, in any order of the batches.

        requests: of all prompts, by their place.

        Raises:
            UserError: it cannot go on.
        """
        ...

    def close(self) -> None:
        """Give back its memory."""
        ...


def cut_at_stop(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """The text before the first of the texts that end it, and whether there was one."""
    found = [place for each in stop if (place := text.find(each)) >= 0]
    return (text[: min(found)], True) if found else (text, False)
