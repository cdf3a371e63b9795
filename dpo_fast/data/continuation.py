"""A finished turn, as it goes on from the generation prompt.

The finished conversation, rendered with the answer, says what the model would have to write. Most
often it begins with the generation prompt. It does not where the template

    opens thinking and leaves it out of finished turns (DeepSeek R1)
        thinking answers     <A><think>\\n | r\\n</think>\\n\\nyes</s>    thinking as it was written
        others               <A> | yes</s>                            as far as both texts agree
    opens thinking and closes it in finished turns without (Nemotron)
                             <A><think>\\n | </think>yes</s>
    opens thinking in finished turns too, whatever follows (Nemotron Nano 2)
        thinking answers     <A><think>\\n | r\\n</think>\\n\\nyes</s>    opened once
        others               <A> | yes</s>
    closes thinking and finished turns say nothing of it
                             <A><think></think> | yes</s>
    renders earlier turns in another way once an answer follows (Kimi K2 Thinking, Mistral)
                             the last turn, after the generation prompt
    ends with white space that finished turns lack.

All else is refused.
"""

from __future__ import annotations

import os.path
import re
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Protocol

from dpo_fast.data.messages import Messages
from dpo_fast.data.thinking import (
    SWITCHES,
    continue_thought,
    find_opening,
    find_thought,
    without_empty_thought,
    write_thought,
)
from dpo_fast.data.verdicts import BadRow

PROBE = "Zyzzyva"  # a word that no template has
CLOSED = "the answer thinks and the chat template's generation prompt ends thinking"


class Template(Protocol):
    """name: for errors. source: its text. header: what the generation prompt adds to a question.

    lead: what a finished turn has between the header and the answer's words; None if unknown.
    after_answer: what is rendered after an answer's words, before a message of a role or at the end.
    """

    name: str
    source: str
    header: str
    lead: str | None

    def after_answer(self, following: str | None) -> str: ...


class Continuation:
    """Texts of finished conversations, made to begin with one generation prompt.

    finish: renders the prompt's messages and an answer of one word.
    """

    def __init__(self, prompt: str, template: Template, finish: Callable[[str], str]) -> None:
        self.prompt, self.template, self.finish = prompt, template, finish
        self.opening = find_opening(prompt)
        self.base = self.opening.base if self.opening else prompt

    def check_thinking(self, answers: Mapping[str, Messages]) -> None:
        """Raises BadRow if an answer thinks although the prompt has ended thinking."""
        if self.opening is None or not self.opening.closed:
            return
        for field, answer in answers.items():
            if any(map(find_thought, answer)):
                source = self.template.source
                switch = next(
                    (each for each in SWITCHES if re.search(rf"\b{each}\b", source)), None
                )
                remedy = f"set data.chat_template_kwargs={{{switch}: true}}, " if switch else ""
                raise BadRow(
                    CLOSED,
                    f"{field} ({self.template.name}); {remedy}or leave the thinking out of the rows",
                )

    def continued(self, texts: dict[str, str]) -> tuple[str, list[str]]:
        """The prompt, and the texts by field as they follow it. Raises BadRow.

        The prompt ends before the thinking that it opens if an answer has none.
        """
        prompt, whole = self.prompt, list(texts.values())
        if any(self._reopened(text) is not None for text in whole):
            pass
        elif all(text.startswith(prompt) for text in whole):
            return prompt, [prompt + self._without_header(text[len(prompt) :]) for text in whole]
        elif all(text.startswith(prompt.rstrip()) for text in whole):
            return prompt, [prompt + text[common(prompt, text) :] for text in whole]
        rests = {field: self._after_base(text, field) for field, text in texts.items()}
        opening = self.opening
        if opening is None:
            return prompt, [prompt + rest for rest in rests.values()]
        if opening.closed:
            answers = (without_empty_thought(rest, opening) for rest in rests.values())
            return prompt, [prompt + answer for answer in answers]
        thinking = [continue_thought(prompt, rest, opening) for rest in rests.values()]
        if None in thinking:
            return self.base, [self.base + rest for rest in rests.values()]
        return prompt, thinking

    def written(self, text: str, answer: Messages, field: str) -> str | None:
        """The text with the thinking of its answer, which the template leaves out.

        None if it has no place for thinking.
        """
        thought = find_thought(answer[0])
        if thought is None:
            return text
        rest = self._after_base(text, field)
        return write_thought(self.prompt, rest, thought, self.opening)

    def _after_base(self, text: str, field: str) -> str:
        """The finished turn after the header that ends the prompt. Raises BadRow."""
        reopened = self._reopened(text)
        if reopened is not None:
            return reopened
        for base in (self.base, self._finished_base):
            if base is not None and text.startswith(base):
                return text[len(base) :]
        raise BadRow(
            "the chat template does not keep the prompt as a prefix",
            f"rendered with {field}, the text does not begin with the rendered prompt "
            f"({self.template.name}); use a template that renders earlier turns the same way "
            "(data.chat_template)",
        )

    def _reopened(self, text: str) -> str | None:
        """The finished turn after thinking that its template opens and leaves open, or opens twice.

        None if there is nothing of that kind.
        """
        opening = self.opening
        if opening is None or opening.closed or not text.startswith(self.prompt):
            return None
        rest = text[len(self.prompt) :]
        if rest.lstrip().startswith(opening.open):
            return rest.lstrip()
        return None if opening.close in rest else rest

    @cached_property
    def _finished_base(self) -> str | None:
        """The prompt as it is once an answer follows; None if it is not found."""
        lead = self.template.lead
        before = self.finish(PROBE).partition(PROBE)[0]
        if lead is None or not before.endswith(lead):
            return None
        return before[: len(before) - len(lead)]

    def _without_header(self, rest: str) -> str:
        """`rest` without a turn's header, where generation goes on in the last turn.

        Diffusion Gemma goes on after a tool's result, and its finished turns begin anew.
        """
        header = self.template.header
        return rest if self.prompt.endswith(header) else rest.removeprefix(header)


def common(left: str, right: str) -> int:
    """Length of the common beginning."""
    return len(os.path.commonprefix([left, right]))
