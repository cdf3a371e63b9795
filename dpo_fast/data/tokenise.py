"""A row becomes the token ids of its prompt and answers, cut to fit into data.max_length."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dpo_fast.data.boundary import PromptBoundary
from dpo_fast.data.chat import ChatTemplate
from dpo_fast.data.config import DataConfig
from dpo_fast.data.endings import Endings
from dpo_fast.data.kinds import COMPLETIONS, GROUPS, PAIRS
from dpo_fast.data.rows import Row
from dpo_fast.data.verdicts import BadRow, Dropped
from dpo_fast.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Tokenised:
    """Ids of one row. A sequence is prompt_ids + an answer's ids, and the answer's ids are scored.

    merged: 1 if a token straddles the prompt's end.
    bos_added, eos_added: special tokens that the text did not have; at most one EOS for each answer.
    prompt_cut: prompt tokens removed.
    answers_cut: answers shortened.
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
        if type(tokenizer).__name__ == "MistralCommonBackend":
            raise UserError(
                "the tokenizer is that of the package mistral-common, which renders no chat as text; "
                "load it with AutoTokenizer.from_pretrained(..., mistral_format=False)"
            )
        self.tokenizer = tokenizer
        self.config = config
        self.chat = ChatTemplate(tokenizer, config)
        self.boundary = PromptBoundary(tokenizer)
        self.endings = Endings(tokenizer, eos_ids, config.add_eos, self.chat)

    def __call__(self, row: Row) -> Tokenised:
        """Raises BadRow or Dropped for the row, and UserError for what no row can mend."""
        prompt, texts = self.chat.texts(row) if row.is_chat else (row.prompt, self._texts(row))
        split = self.boundary.split(prompt, *texts, keep=row.is_chat)
        prompt_ids, bos_added = self.endings.begin(split.prompt, chat=row.is_chat)
        if not prompt_ids and not prompt and self.endings.bos_id is not None:
            prompt_ids, bos_added = [self.endings.bos_id], True
        if not prompt_ids:
            raise BadRow(
                "no prompt token",
                "the prompt's tokens all join with the answers'"
                if prompt
                else "the prompt is empty, and the tokenizer has no BOS to predict the first token from",
            )
        answers, eos_added = {}, 0
        for name, ids in zip(row.answers, split.answers):
            calls = row.is_chat and bool(row.answers[name][-1].get("tool_calls"))
            self.endings.check_bos(ids, name)
            answers[name], added = self.endings.end(ids, chat=row.is_chat, calls=calls)
            eos_added += added
        fitted = fit(row.where, prompt_ids, answers, self.config, self.endings.lead(prompt_ids))
        columns = [fitted.answers] if row.kind.many else fitted.answers
        return TOKENISED[row.kind](
            prompt_ids=fitted.prompt,
            **dict(zip(row.kind.ids[1:], columns)),
            merged=int(split.merged),
            bos_added=int(bos_added),
            eos_added=eos_added,
            prompt_cut=fitted.prompt_cut,
            answers_cut=fitted.answers_cut,
        )

    def _texts(self, row: Row) -> list[str]:
        return [row.prompt + answer for answer in row.answers.values()]


@dataclass(frozen=True)
class Fitted:
    """Ids that fit; prompt_cut: tokens removed; answers_cut: answers shortened."""

    prompt: list[int]
    answers: list[list[int]]
    prompt_cut: int = 0
    answers_cut: int = 0


def fit(
    where: str,
    prompt: list[int],
    answers: Mapping[str, list[int]],
    config: DataConfig,
    lead: int = 0,
) -> Fitted:
    """Cuts a row so that prompt + answer is at most config.max_length tokens, for every answer.

    All sequences of a row keep the same prompt. First the answers are cut: each keeps its first
    `max_length - min(len(prompt), max_prompt_length)` tokens. Then the prompt is cut to the room
    that the longest answer leaves: its end stays (`keep_end`, with its first `lead` tokens still
    first) or its start (`keep_start`). So answers are cut only where the prompt is down to its
    reserve, and at least one token of each part stays. With max_length=8 and max_prompt_length=3:

        prompt 4, chosen 4, rejected 2    fits: 4 + 4
        prompt 9, chosen 4, rejected 2    prompt cut to 4
        prompt 9, chosen 7, rejected 2    chosen cut to 5, prompt to 3
        prompt 1, chosen 9, rejected 2    chosen cut to 7, prompt stays 1

    A cut answer gets no end of turn, so that the model does not learn to stop in mid-sentence.
    `drop` and `error` never cut.

    Raises:
        Dropped: too long under `drop`; an answer without tokens; answers that are the same tokens,
            or become so by the cut.
        UserError: too long under `error`.
    """
    parts = list(answers.values())
    if not all(parts):
        raise Dropped("an answer has no tokens")
    if _alike(parts):
        raise Dropped("the answers are the same tokens")
    longest = len(prompt) + max(map(len, parts))
    if longest <= config.max_length:
        return Fitted(prompt, parts)
    if config.truncation == "drop":
        raise Dropped("longer than max_length", f"{longest} > {config.max_length} tokens")
    if config.truncation == "error":
        raise _too_long(where, {"prompt": prompt, **answers}, longest, config)
    return _cut(prompt, parts, config, lead)


def _alike(answers: list[list[int]]) -> bool:
    """Whether all answers are the same. A single answer has none to be compared with."""
    return len(answers) > 1 and all(answer == answers[0] for answer in answers)


def _too_long(
    where: str, parts: Mapping[str, list[int]], longest: int, config: DataConfig
) -> UserError:
    counts = [f"{len(ids)} {name}" for name, ids in parts.items()]
    return UserError(
        f"{where}: {', '.join(counts[:-1])} and {counts[-1]} tokens do not fit into "
        f"data.max_length={config.max_length}; raise it to {longest}, or set data.truncation to "
        "keep_end, keep_start or drop"
    )


def _cut(prompt: list[int], answers: list[list[int]], config: DataConfig, lead: int) -> Fitted:
    room = config.max_length - min(len(prompt), config.prompt_reserve)
    answers_cut = sum(len(answer) > room for answer in answers)
    answers = [answer[:room] for answer in answers]
    if _alike(answers):
        raise Dropped("the answers are the same once cut", f"all keep {room} tokens")
    length = min(len(prompt), config.max_length - max(map(len, answers)))
    prompt_cut = len(prompt) - length
    if config.truncation == "keep_start":
        kept = prompt[:length]
    else:
        lead = min(lead, length) if prompt_cut else 0
        kept = [*prompt[:lead], *prompt[len(prompt) - length + lead :]]
    return Fitted(kept, answers, prompt_cut, answers_cut)
