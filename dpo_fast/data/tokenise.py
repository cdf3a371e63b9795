"""A row becomes token ids: the prompt's and each answer's."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_fast.data.boundary import PromptBoundary
from dpo_fast.data.config import DataConfig
from dpo_fast.data.endings import Endings
from dpo_fast.data.kinds import COMPLETIONS, GROUPS, PAIRS
from dpo_fast.data.rows import Row
from dpo_fast.data.truncate import fit
from dpo_fast.data.verdicts import BadRow
from dpo_fast.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Tokenised:
    """Ids of one row. prompt_ids + an answer's ids is a sequence; the answer's are what is scored.

    The counters tell what was done on the way: `merged`, a token straddles the prompt's end;
    `bos_added` (0 or 1) and `eos_added` (at most one an answer), special tokens the text did not have
    itself; `prompt_cut`, prompt tokens removed; `answers_cut`, answers shortened.
    """

    prompt_ids: list[int]
    merged: int
    bos_added: int
    eos_added: int
    prompt_cut: int
    answers_cut: int


@dataclass(frozen=True, kw_only=True)
class TokenisedPair(Tokenised):
    """Two answers to one prompt."""

    chosen_ids: list[int]
    rejected_ids: list[int]


@dataclass(frozen=True, kw_only=True)
class TokenisedCompletion(Tokenised):
    """One answer."""

    completion_ids: list[int]


@dataclass(frozen=True, kw_only=True)
class TokenisedGroup(Tokenised):
    """Two or more answers to one prompt."""

    completions_ids: list[list[int]]


TOKENISED = {PAIRS: TokenisedPair, COMPLETIONS: TokenisedCompletion, GROUPS: TokenisedGroup}


class RowTokeniser:
    """Tokenises rows with one tokenizer and one configuration.

    tokenizer: a transformers tokenizer. It is not changed; data.chat_template is only used here.
    eos_ids: end-of-turn ids beside the tokenizer's EOS, as in the model's generation config.
    """

    def __init__(self, tokenizer: Any, config: DataConfig, eos_ids: Iterable[int] = ()) -> None:
        self.tokenizer = tokenizer
        self.config = config
        self.template = read_template(config)
        self.boundary = PromptBoundary(tokenizer)
        self.endings = Endings(tokenizer, eos_ids, config.add_eos)

    def __call__(self, row: Row) -> Tokenised:
        """Raises BadRow, Dropped, and UserError for what no row can mend."""
        prompt, texts = self._render(row) if row.is_chat else (row.prompt, self._texts(row))
        split = self.boundary.split(prompt, *texts)
        prompt_ids, bos_added = self.endings.begin(split.prompt)
        if not prompt_ids:
            raise BadRow("no prompt token", "the prompt's tokens all join with the answers'")
        answers, eos_added = {}, 0
        for name, ids in zip(row.answers, split.answers):
            answers[name], added = self._answer(ids, name, row.is_chat)
            eos_added += added
        fitted = fit(row.where, prompt_ids, answers, self.config, self.endings.bos_id)
        return TOKENISED[row.kind](
            prompt_ids=fitted.prompt,
            **dict(zip(row.kind.ids[1:], [fitted.answers] if row.kind.many else fitted.answers)),
            merged=int(split.merged),
            bos_added=int(bos_added),
            eos_added=eos_added,
            prompt_cut=fitted.prompt_cut,
            answers_cut=fitted.answers_cut,
        )

    def _texts(self, row: Row) -> list[str]:
        return [row.prompt + answer for answer in row.answers.values()]

    def _answer(self, ids: list[int], field: str, chat: bool) -> tuple[list[int], bool]:
        bos = self.endings.bos_id
        if bos is not None and bos not in self.endings.end_ids and bos in ids:
            raise BadRow(f"BOS inside {field}", "it begins a text and would be scored here")
        return self.endings.end(ids, chat=chat)

    def _render(self, row: Row) -> tuple[str, list[str]]:
        """The texts of the prompt and of prompt + answer, through the template."""
        if self.template is None and not self.tokenizer.chat_template:
            raise UserError(
                f"{row.where}: the row is a list of messages, but the tokenizer has no chat "
                "template; set data.chat_template to a Jinja file"
            )
        prompt = self._apply(row, row.prompt, generate=True)
        texts = []
        for field, answer in row.answers.items():
            text = self._apply(row, row.prompt + answer, generate=False)
            if not text.startswith(prompt):
                raise BadRow(
                    "the chat template does not keep the prompt as a prefix",
                    f"rendered with {field}, the text does not begin with the rendered prompt; "
                    "use a template that renders earlier turns the same way (data.chat_template)",
                )
            texts.append(text)
        return prompt, texts

    def _apply(self, row: Row, messages: list[dict[str, Any]], *, generate: bool) -> str:
        from jinja2 import TemplateError

        try:
            return self.tokenizer.apply_chat_template(
                messages,
                chat_template=self.template,
                tools=row.extras.get("tools"),
                add_generation_prompt=generate,
                tokenize=False,
                **row.extras.get("chat_template_kwargs", {}),
            )
        except (TemplateError, TypeError) as error:
            raise BadRow("the chat template refuses the messages", str(error)) from error


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
