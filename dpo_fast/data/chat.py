"""Chats to texts, through a chat template.

At inference a model is fed the generation prompt: the prompt's messages, rendered with
add_generation_prompt=True. An example's prompt is exactly that text, and what is scored is what the
model would have to write after it. The finished conversation, rendered with the answer, says what
that is. Most often it begins with the generation prompt. It does not where the template

    opens thinking and leaves it out of finished turns (DeepSeek R1)
        thinking answers     <A><think>\\n | r\\n</think>\\n\\nyes</s>    thinking as it was written
        others               <A> | yes</s>                            as far as both texts agree
    opens thinking and closes it in finished turns without (Nemotron)
                             <A><think>\\n | </think>yes</s>
    closes thinking and finished turns say nothing of it
                             <A><think></think> | yes</s>
    ends with white space that finished turns lack.

All else is refused, as is whatever a template leaves out without a word.
"""

from __future__ import annotations

import copy
import os.path
import re
from functools import cached_property
from pathlib import Path
from typing import Any

from dpo_fast.data.config import DataConfig
from dpo_fast.data.dialects import (
    WRITTEN,
    Dialect,
    dialects,
    left_out_of_answer,
    left_out_of_prompt,
)
from dpo_fast.data.prompts import Messages
from dpo_fast.data.rows import Row
from dpo_fast.data.thinking import (
    SWITCHES,
    continue_thought,
    find_opening,
    find_thought,
    without_empty_thought,
    write_thought,
)
from dpo_fast.data.verdicts import BadRow
from dpo_fast.errors import UserError

CLOSED = "the answer thinks and the chat template's generation prompt ends thinking"
PROBE = "Zyzzyva"  # a word that no template has


class ChatTemplate:
    """The template of data.chat_template, or the tokenizer's. The tokenizer is not changed."""

    def __init__(self, tokenizer: Any, config: DataConfig) -> None:
        self.tokenizer = tokenizer
        self.custom = read_template(config)
        self.path = config.chat_template
        self.kwargs = config.chat_template_kwargs

    @property
    def exists(self) -> bool:
        return bool(self.custom or self.tokenizer.chat_template)

    @property
    def name(self) -> str:
        if self.path is not None:
            return f"data.chat_template={self.path}"
        path = getattr(self.tokenizer, "name_or_path", "")
        return f"the chat template of {path or 'the tokenizer'}"

    @cached_property
    def source(self) -> str:
        """Its text; of a tokenizer with several templates, all of them."""
        template = self.custom or self.tokenizer.chat_template or ""
        return "\n".join(template.values()) if isinstance(template, dict) else template

    def texts(self, row: Row) -> tuple[str, list[str]]:
        """The generation prompt, and for every answer the whole text, which begins with it.

        Raises:
            BadRow: the template refuses the row, leaves some of it out, or renders the prompt in
                another way once an answer follows.
        """
        self._check_kwargs()
        if not self.exists:
            raise UserError(
                f"{row.where}: the row is a list of messages, but the tokenizer has no chat "
                "template; set data.chat_template to a Jinja file"
            )
        reasons: list[BadRow] = []
        for dialect in dialects(row.prompt, list(row.answers.values()), self.source, self._parts):
            try:
                return self._in_dialect(row, dialect)
            except BadRow as verdict:
                reasons.append(verdict)
        raise next((reason for reason in reasons if reason.fault == CLOSED), reasons[0])

    def _check_kwargs(self) -> None:
        """Jinja passes over arguments that a template does not know, a slip of the pen too."""
        for name, value in self.kwargs.items():
            if self.exists and not re.search(rf"\b{re.escape(name)}\b", self.source):
                raise UserError(
                    f"data.chat_template_kwargs.{name}={value!r} is not used by {self.name}; remove "
                    "it, or correct its name"
                )

    def _in_dialect(self, row: Row, dialect: Dialect) -> tuple[str, list[str]]:
        tools, kwargs = row.optional.get("tools"), row.optional.get("chat_template_kwargs", {})
        before = dialect.prompt(row.prompt)
        prompt = self.render(before, generate=True, tools=tools, **kwargs)
        self._keep(left_out_of_prompt(row.prompt, tools, prompt))
        texts = []
        for field, answer in row.answers.items():
            messages = before + dialect.answer(answer)
            text = self.render(messages, generate=False, tools=tools, **kwargs)
            if dialect.thinking == WRITTEN:
                text = self._written(prompt, text, answer, field)
            texts.append(text)
        prompt, texts = self._continued(prompt, dict(zip(row.answers, texts)))
        for (field, answer), text in zip(row.answers.items(), texts):
            self._keep_answer(answer, field, text[len(prompt) :])
        return prompt, texts

    def render(
        self, messages: Messages, *, generate: bool, tools: Any = None, **kwargs: Any
    ) -> str:
        """Raises BadRow if the template refuses the messages."""
        from jinja2 import TemplateError

        try:
            return self.tokenizer.apply_chat_template(
                messages,
                chat_template=self.custom,
                tools=tools,
                add_generation_prompt=generate,
                tokenize=False,
                **(self.kwargs | kwargs),
            )
        except (TemplateError, TypeError, KeyError, AttributeError) as error:
            raise BadRow(
                "the chat template refuses the messages", f"{error} ({self.name})"
            ) from error

    def after_answer(self, following: str | None) -> str:
        """What is rendered after the text of an answer, which a message of role `following` follows."""
        messages = [("user", "a"), ("assistant", PROBE)]
        messages += [(following, "b")] if following else []
        try:
            text = self._plain(*messages)
        except BadRow:
            return ""
        return text.rpartition(PROBE)[2]

    @cached_property
    def two_turns(self) -> str:
        """A conversation of two questions and two answers; empty if the template refuses it."""
        try:
            return self._plain(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
        except BadRow:
            return ""

    def _plain(self, *messages: tuple[str, str]) -> str:
        dialect = Dialect(parts=self._parts)
        plain = [{"role": role, "content": content} for role, content in messages]
        return self.render(dialect.prompt(plain), generate=False)

    @cached_property
    def _parts(self) -> bool:
        """Whether the template takes content as parts and does not write it if it is text."""
        for parts in (False, True):
            message = Dialect(parts=parts).prompt([{"role": "user", "content": PROBE}])
            try:
                if PROBE in self.render(message, generate=True):
                    return parts
            except BadRow:
                continue
        return False

    def _continued(self, prompt: str, texts: dict[str, str]) -> tuple[str, list[str]]:
        """The texts as they follow the generation prompt. Raises BadRow."""
        whole = list(texts.values())
        if all(text.startswith(prompt) for text in whole):
            return prompt, [prompt + self._without_header(prompt, text) for text in whole]
        bare = prompt.rstrip()
        if all(text.startswith(bare) for text in whole):
            common = os.path.commonprefix([prompt, *whole])
            return prompt, [prompt + text[len(common) :] for text in whole]
        opening = find_opening(prompt)
        base = opening.base if opening else prompt
        rests = {field: self._after(base, text, field) for field, text in texts.items()}
        if opening is None:
            return prompt, [prompt + rest for rest in rests.values()]
        if opening.closed:
            answers = {name: without_empty_thought(rest, opening) for name, rest in rests.items()}
            self._keep_closed(answers, opening.open)
            return prompt, [prompt + answer for answer in answers.values()]
        thinking = [continue_thought(prompt, rest, opening) for rest in rests.values()]
        if None in thinking:
            return base, [base + rest for rest in rests.values()]
        return prompt, thinking

    def _after(self, base: str, text: str, field: str) -> str:
        """The finished turn of a whole text, after the header that ends `base`. Raises BadRow.

        Where the text begins in another way than `base` (Kimi K2 drops thinking of earlier turns once
        an answer follows), the last header of both is the answer's, if they have equally many.
        """
        if text.startswith(base):
            return text[len(base) :]
        opening = find_opening(self._header)
        header = opening.base if opening else self._header
        if header.strip() and base.endswith(header) and text.count(header) == base.count(header):
            return text.rpartition(header)[2]
        raise BadRow(
            "the chat template does not keep the prompt as a prefix",
            f"rendered with {field}, the text does not begin with the rendered prompt ({self.name}); "
            "use a template that renders earlier turns the same way (data.chat_template)",
        )

    def _without_header(self, prompt: str, text: str) -> str:
        """What follows the prompt, without a turn's header where generation goes on in the last turn.

        Diffusion Gemma goes on after a tool's result, and its finished turns begin anew.
        """
        header, rest = self._header, text[len(prompt) :]
        return rest.removeprefix(header) if not prompt.endswith(header) else rest

    @cached_property
    def _header(self) -> str:
        """What the generation prompt of a question has after the question's turn."""
        message = Dialect(parts=self._parts).prompt([{"role": "user", "content": PROBE}])
        try:
            bare = self.render(message, generate=False)
            return self.render(message, generate=True).removeprefix(bare)
        except BadRow:
            return ""

    def _written(self, prompt: str, text: str, answer: Messages, field: str) -> str:
        """The finished turn with the thinking of its answer, which the template leaves out."""
        thought = next(filter(None, map(find_thought, answer)), None)
        if thought is None:
            return text
        opening = find_opening(prompt)
        rest = self._after(opening.base if opening else prompt, text, field)
        if opening and opening.closed:
            self._keep_closed({field: thought.open}, thought.open)
        written = write_thought(prompt, rest, thought, opening)
        if written is None:
            self._keep(f"the {thought.key or 'thinking'} of {field}")
        return written

    def _keep_closed(self, answers: dict[str, str], mark: str) -> None:
        for field, rest in answers.items():
            if rest.startswith(mark):
                switch = next((name for name in SWITCHES if name in self.source), None)
                remedy = f"set data.chat_template_kwargs={{{switch}: true}}, " if switch else ""
                raise BadRow(
                    CLOSED,
                    f"{field} begins with {mark!r} ({self.name}); {remedy}or leave the thinking out",
                )

    def _keep_answer(self, answer: Messages, field: str, scored: str) -> None:
        self._keep(left_out_of_answer(answer, field, scored, thinking=True))
        for thought in filter(None, map(find_thought, answer)):
            if scored.count(thought.close) > max(
                1, *(str(m["content"]).count(thought.close) for m in answer)
            ):
                raise BadRow(
                    "the chat template adds thinking to an answer that thinks",
                    f"{field} has {thought.close!r} twice ({self.name})",
                )

    def _keep(self, missing: str | None) -> None:
        if missing is not None:
            raise BadRow(
                "the chat template leaves something out",
                f"it does not write {missing} ({self.name}); use a template that does "
                "(data.chat_template), or take that out of the row",
            )


def read_template(config: DataConfig) -> str | None:
    """The text of data.chat_template, or None. Raises UserError when it cannot be read."""
    if config.chat_template is None:
        return None
    try:
        return Path(config.chat_template).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"data.chat_template={config.chat_template!r} cannot be read: {error}; give the path "
            "of a Jinja file"
        ) from error


def with_template(tokenizer: Any, config: DataConfig) -> Any:
    """The tokenizer, or a copy that has data.chat_template for its own, to be saved with the model."""
    template = read_template(config)
    if template is None:
        return tokenizer
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer
