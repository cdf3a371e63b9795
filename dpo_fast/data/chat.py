"""Chats to texts, through a chat template.

At inference a model is fed the generation prompt: the prompt's messages, rendered with
add_generation_prompt=True. An example's prompt is exactly that text, and what is scored is what the
model would have to write after it: see `continuation.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property, partial
from typing import Any

from jinja2 import TemplateError

from dpo_fast.data.config import DataConfig
from dpo_fast.data.continuation import CLOSED, PROBE, Continuation
from dpo_fast.data.dialects import (
    WRITTEN,
    Dialect,
    dialects,
    left_out_of_answer,
    left_out_of_prompt,
    marked_tools,
)
from dpo_fast.data.messages import Messages
from dpo_fast.data.prefill import ends_open, prefill_of, whole_answers
from dpo_fast.data.rows import Row
from dpo_fast.data.template_file import read_template
from dpo_fast.data.thinking import KEYS, find_opening, find_thought, never_closed, thinks
from dpo_fast.data.time_limit import limited
from dpo_fast.data.turns import Text, Trajectory, check_scored, has_unscored, until_assistant
from dpo_fast.data.verdicts import BadRow, Dropped
from dpo_fast.errors import UserError

REFUSED = "the chat template refuses the messages"
OUT = "take that out of the row"
SECONDS = 20.0  # of processor time for one rendering, which takes milliseconds


class Endless(UserError):
    """A chat template that does not end."""


class ChatTemplate:
    """The template of data.chat_template, or the tokenizer's. The tokenizer is not changed."""

    def __init__(self, tokenizer: Any, config: DataConfig) -> None:
        self.tokenizer = tokenizer
        self.custom = read_template(config)
        self.path = config.chat_template
        self.kwargs = config.chat_template_kwargs
        self.scored = config.scored

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

    def texts(self, row: Row) -> tuple[str, list[Text]]:
        """The generation prompt, and for every answer the whole text, which begins with it.

        Messages after an answer's last turn of the assistant are left off. Of the forms that messages
        may take, the first counts whose thinking the template writes.

        Raises:
            BadRow: the template refuses the row, leaves some of it out, or renders the prompt in
                another way once an answer follows.
            UserError: it does not end, and so would not with other rows.
        """
        try:
            return self._texts(row)
        except Endless as error:
            raise UserError(f"{row.where}: {error}; mend the template, or set another") from None

    def _texts(self, row: Row) -> tuple[str, list[Text]]:
        self._check_kwargs()
        if not self.exists:
            raise UserError(
                f"{row.where}: the row is a list of messages, but the tokenizer has no chat "
                "template; set data.chat_template to a Jinja file"
            )
        reasons: list[BadRow] = []
        found: list[tuple[str, list[Text]]] = []
        prefill = prefill_of(row)
        row = whole_answers(row, prefill)
        answers = {name: until_assistant(answer) for name, answer in row.answers.items()}
        for name, answer in answers.items():
            check_scored(answer, name, self.scored)
            if any(never_closed(message, self.source) for message in answer):
                raise Dropped("thinking that does not end", f"{name} has no words after it")
        for dialect in dialects(row.prompt, list(answers.values()), self.source, self.takes_parts):
            try:
                prompt, texts = self._in_dialect(row, answers, dialect)
                if prefill:
                    prompt, texts = self._open(row, dialect, prompt, texts, prefill)
                found.append((prompt, texts))
            except BadRow as verdict:
                reasons.append(verdict)
            if found and _settled(found[-1]):
                return found[-1]
        if found:
            return found[0]
        raise max(reasons, key=lambda reason: (reason.fault == CLOSED, reason.fault != REFUSED))

    def _check_kwargs(self) -> None:
        """Jinja passes over arguments that a template does not know, a slip of the pen too."""
        for name, value in self.kwargs.items():
            if self.exists and not re.search(rf"\b{re.escape(name)}\b", self.source):
                raise UserError(
                    f"data.chat_template_kwargs.{name}={value!r} is not used by {self.name}; remove "
                    "it, or correct its name"
                )

    def _in_dialect(
        self, row: Row, answers: dict[str, Messages], dialect: Dialect
    ) -> tuple[str, list[Text]]:
        tools, kwargs = row.optional.get("tools"), row.optional.get("chat_template_kwargs", {})
        before = dialect.prompt(row.prompt)

        def render(messages: Messages, generate: bool = False) -> str:
            return self.render(before + messages, generate=generate, tools=tools, kwargs=kwargs)

        prompt = render([], generate=True)
        self.check_prompt(row.prompt, prompt)
        if tools and prompt == self._without_tools(before, kwargs):
            self._keep("the column 'tools'")
        for field, answer in answers.items():
            self._keep(self._unwritten(row, field, answer, dialect))
        turns = Continuation(prompt, self, lambda word: render(_messages(("assistant", word))))
        turns.check_thinking(answers)
        texts = {}
        for field, answer in answers.items():
            if has_unscored(answer, self.scored):
                texts[field] = Trajectory(field, answer, dialect, render, self).text(self.scored)
                continue
            text = render(dialect.answer(answer))
            if dialect.thinking == WRITTEN:
                text = turns.written(text, answer, field)
                self._keep(None if text else f"the thinking of {field}")
            texts[field] = Text(text, answer)
        prompt, whole = turns.continued({field: text.whole for field, text in texts.items()})
        texts = {name: each.begun(prompt, text) for (name, each), text in zip(texts.items(), whole)}
        for field, text in texts.items():
            self._keep_answer(text, field, text.whole[len(prompt) :])
        return prompt, list(texts.values())

    def check_prompt(self, messages: Messages, text: str) -> None:
        """Raises BadRow if a rendered prompt lacks some of its messages."""
        self._keep(left_out_of_prompt(messages, text))

    def _open(
        self, row: Row, dialect: Dialect, prompt: str, texts: list[Text], prefill: str
    ) -> tuple[str, list[Text]]:
        """Prompt and texts with the prefill at the prompt's end. Raises BadRow."""
        unfinished = self._unfinished(row, dialect, prefill)
        wholes = [text.whole for text in texts]
        prompt, wholes = ends_open(prompt, wholes, prefill, unfinished, self.name)
        return prompt, [text.begun(prompt, whole) for text, whole in zip(texts, wholes)]

    def _unfinished(self, row: Row, dialect: Dialect, prefill: str) -> str:
        """The prompt with the prefill, as it is rendered for inference; empty if that is refused."""
        messages = dialect.prompt([*row.prompt, *_messages(("assistant", prefill))])
        tools, kwargs = row.optional.get("tools"), row.optional.get("chat_template_kwargs")
        try:
            return self.render(messages, unfinished=True, tools=tools, kwargs=kwargs)
        except BadRow:
            return ""

    def render(
        self,
        messages: Messages,
        *,
        generate: bool = False,
        unfinished: bool = False,
        tools: Any = None,
        kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """unfinished: generation goes on in the last message. kwargs: before those of the whole run.

        Raises BadRow if the template refuses the messages, and Endless if it does not end.
        """
        write = partial(
            self.tokenizer.apply_chat_template,
            [messages],  # a batch, as a conversation by itself may not be empty
            chat_template=self.custom,
            tools=tools,
            add_generation_prompt=generate,
            continue_final_message=unfinished,
            tokenize=False,
            **(self.kwargs | dict(kwargs or {})),
        )
        try:
            return limited(SECONDS, write)[0]
        except TimeoutError as error:
            raise Endless(
                f"{self.name} does not end: it took {error} for one conversation"
            ) from None
        except TemplateError as error:
            raise BadRow(REFUSED, f"{error} ({self.name})") from error
        except Exception as error:  # a template is a program, and may raise anything
            raise BadRow(REFUSED, f"{type(error).__name__}: {error} ({self.name})") from error

    def _unwritten(self, row: Row, field: str, answer: Messages, dialect: Dialect) -> str | None:
        """What a template leaves out of calls and their results, in words; None if it writes them all.

        Answers repeat what tools say, and lists of tools name what is called, so that words do not tell:
        marks in their places do.
        """
        size = len(row.prompt)
        messages, marks = marked_tools([*row.prompt, *answer])
        if not marks:
            return None
        before, after = dialect.prompt(messages[:size]), dialect.answer(messages[size:])
        tools, kwargs = row.optional.get("tools"), row.optional.get("chat_template_kwargs", {})
        try:
            text = self.render([*before, *after], tools=tools, kwargs=kwargs)
        except BadRow:
            return None  # the messages themselves are judged by their own rendering
        for mark, (place, what) in marks.items():
            if mark not in text:
                name = f"prompt[{place}]" if place < size else f"{field}[{place - size}]"
                return what.format(name)
        return None

    def _without_tools(self, messages: Messages, kwargs: Mapping[str, Any]) -> str | None:
        """The generation prompt without tools; None if the template cannot do without."""
        try:
            return self.render(messages, generate=True, kwargs=kwargs)
        except BadRow:
            return None

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
        return self._probe(Dialect(parts=self.takes_parts).prompt(_messages(*messages)))

    def _probe(self, messages: Messages, generate: bool = False) -> str:
        """Rendered without tools; with an empty list of them if the template cannot do without."""
        try:
            return self.render(messages, generate=generate)
        except BadRow:
            return self.render(messages, generate=generate, tools=[])

    @cached_property
    def takes_parts(self) -> bool:
        """Whether the template takes content as parts and does not write it if it is text."""
        for parts in (False, True):
            message = Dialect(parts=parts).prompt(_messages(("user", PROBE)))
            try:
                if PROBE in self._probe(message, generate=True):
                    return parts
            except BadRow:
                continue
        return False

    def after_question(self, generate: bool) -> str:
        """What is rendered after the text of a question, with the generation prompt or without."""
        return self.question(PROBE, generate).rpartition(PROBE)[2]

    def question(self, text: str, generate: bool) -> str:
        """A question by itself; empty if the template refuses it."""
        messages = Dialect(parts=self.takes_parts).prompt(_messages(("user", text)))
        try:
            return self._probe(messages, generate)
        except BadRow:
            return ""

    @cached_property
    def header(self) -> str:
        """What the generation prompt has after the question's turn; empty if that cannot be told."""
        prompt, bare = self.after_question(True), self.after_question(False)
        return prompt.removeprefix(bare) if prompt.startswith(bare) else ""

    @cached_property
    def lead(self) -> str | None:
        """What a finished turn has between that header, without thinking, and the answer's words."""
        question = ("user", "a")
        try:
            prompt = self._probe(Dialect(parts=self.takes_parts).prompt(_messages(question)), True)
            before = self._plain(question, ("assistant", PROBE)).partition(PROBE)[0]
        except BadRow:
            return None
        opening = find_opening(prompt)
        base = opening.base if opening else prompt
        return before[len(base) :] if before.startswith(base) else None

    def _keep_answer(self, text: Text, field: str, scored: str) -> None:
        """scored: the text after the prompt."""
        answer = text.answer
        self._keep(left_out_of_answer(answer, field, scored))
        for start, stop, place in text.turns:
            self._keep(left_out_of_answer(answer, field, text.whole[start:stop], place))
        for thought in filter(None, map(find_thought, answer)):
            if scored.count(thought.close) > sum(
                max(message["role"] == "assistant", message["content"].count(thought.close))
                for message in answer
            ):
                raise BadRow(
                    "the chat template adds thinking to an answer that thinks",
                    f"{field} has {thought.close!r} twice ({self.name})",
                )

    def _keep(self, missing: str | None) -> None:
        if missing is not None:
            without = "list it in data.ignore_columns" if "the column" in missing else OUT
            thinks = any(f"the {name} of " in missing for name in ("thinking", *KEYS))
            raise BadRow(
                "the chat template leaves something out",
                f"it does not write {missing} ({self.name}); use a template that does "
                f"(data.chat_template), or {without}"
                + (" or write it into the content, as the model is to write it" if thinks else ""),
            )


def _settled(found: tuple[str, list[Text]]) -> bool:
    """Whether no thinking is left out, or only that of some turns: the template knows its form."""
    texts = found[1]
    whole = not any(text.left_out for text in texts)
    return whole or any(thinks(message) for text in texts for message in text.answer)


def _messages(*pairs: tuple[str, str]) -> Messages:
    return [{"role": role, "content": content} for role, content in pairs]
