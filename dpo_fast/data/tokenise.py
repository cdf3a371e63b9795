"""A row becomes the token ids of its prompt and answers, cut to fit into data.max_length."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from dpo_fast.data.boundary import PromptBoundary
from dpo_fast.data.chat import ChatTemplate
from dpo_fast.data.config import IMAGES, DataConfig
from dpo_fast.data.endings import Endings
from dpo_fast.data.images.expand import RowImages
from dpo_fast.data.images.model import images_of
from dpo_fast.data.images.store import ImageStore
from dpo_fast.data.images.tokens import count_image_tokens, whole_images
from dpo_fast.data.kinds import COMPLETIONS, DEMONSTRATIONS, GROUPS, PAIRS, Kind
from dpo_fast.data.messages import Messages
from dpo_fast.data.rows import Row
from dpo_fast.data.turns import Text
from dpo_fast.data.verdicts import BadRow, Dropped
from dpo_fast.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Tokenised:
    """Ids of one row. A sequence is prompt_ids + an answer's ids, and the answer's ids are scored.

    Fields in `_scored` say which of an answer's tokens are; they are None where all are.

    left_out: turns that are not scored because the template leaves out their thinking.
    trailing: answers without their last messages, which are not the assistant's.
    bare: 1 for a text that goes to the model without the chat template that there is.
    merged: 1 if a token straddles the prompt's end.
    bos_added, eos_added: special tokens that the text did not have; at most one EOS for each answer.
    prompt_cut: prompt tokens removed.
    answers_cut: answers shortened.
    images: what is stored of its images; None without any. Their tokens are below 0
        (`images/tokens.py`).
    image_tokens: of the prompt once, and of all answers.
    """

    prompt_ids: list[int]
    merged: int
    bos_added: int
    eos_added: int
    prompt_cut: int
    answers_cut: int
    left_out: int
    trailing: int
    bare: int
    images: list[dict[str, Any]] | None = None
    image_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class TokenisedPair(Tokenised):
    """Two answers to one prompt."""

    chosen_ids: list[int]
    rejected_ids: list[int]
    chosen_scored: list[bool] | None
    rejected_scored: list[bool] | None


@dataclass(frozen=True, kw_only=True)
class TokenisedCompletion(Tokenised):
    """One answer."""

    completion_ids: list[int]
    completion_scored: list[bool] | None


@dataclass(frozen=True, kw_only=True)
class TokenisedGroup(Tokenised):
    """Two or more answers to one prompt."""

    completions_ids: list[list[int]]
    completions_scored: list[list[bool]] | None


TOKENISED = {
    PAIRS: TokenisedPair,
    COMPLETIONS: TokenisedCompletion,
    GROUPS: TokenisedGroup,
    DEMONSTRATIONS: TokenisedCompletion,
}


class RowTokeniser:
    """Tokenises rows with one tokenizer and one configuration.

    tokenizer: a transformers tokenizer. It is not changed; data.chat_template is only used here.
    eos_ids: end-of-turn ids beside the tokenizer's EOS, as in the model's generation config.
    store: where images are that came inside rows.
    """

    def __init__(
        self,
        tokenizer: Any,
        config: DataConfig,
        eos_ids: Iterable[int] = (),
        store: ImageStore | None = None,
    ) -> None:
        if type(tokenizer).__name__ == "MistralCommonBackend":
            raise UserError(
                "the tokenizer is that of the package mistral-common, which renders no chat as text; "
                "load it with AutoTokenizer.from_pretrained(..., mistral_format=False)"
            )
        self.tokenizer = tokenizer
        self.config = config
        self.chat = ChatTemplate(tokenizer, config)
        self.boundary = PromptBoundary(tokenizer)
        self._untold = config.apply_chat_template == "auto" and self.chat.exists
        self.endings = Endings(tokenizer, eos_ids, config.add_eos, self.chat)
        model = images_of(tokenizer, config.images_kwargs)
        self.images = RowImages(model, store or ImageStore(), self.chat, config)

    def __call__(self, row: Row) -> Tokenised:
        """Raises BadRow or Dropped for the row, and UserError for what no row can mend."""
        images = self.images.of(row) if row.optional.get(IMAGES) else None
        prompt, texts = self.chat.texts(row) if row.is_chat else (row.prompt, self._texts(row))
        if images:
            prompt, texts = images.texts(row, prompt, texts)
        starts = [[turn.start for turn in text.turns if turn.start > len(prompt)] for text in texts]
        wholes = [text.whole for text in texts]
        if row.is_chat:
            _check_unicode([prompt, *wholes])
        split = self.boundary.split(prompt, *wholes, keep=row.is_chat, starts=starts)
        begun = self.endings.bos_id is not None and split.answers[0][:1] == [self.endings.bos_id]
        if (
            begun and not row.is_chat and not prompt and row.kind == DEMONSTRATIONS
        ):  # the text brings its BOS
            split = split.from_first_token()
        prompt_ids, bos_added = self.endings.begin(split.prompt, chat=row.is_chat)
        if not prompt_ids and not prompt and self.endings.bos_id is not None:
            prompt_ids, bos_added = [self.endings.bos_id], True
        if not prompt_ids and not prompt and row.kind == DEMONSTRATIONS:
            split = split.from_first_token()
            prompt_ids = split.prompt
        if not prompt_ids:
            raise BadRow(
                "no prompt token",
                "the prompt's tokens all join with the answers'"
                if prompt
                else "the prompt is empty, and the tokenizer has no BOS to predict the first token from",
            )
        answers, eos_added = {}, 0
        parts = zip(row.answers, texts, split.answers, starts, row.unfinished)
        for place, (name, text, ids, cuts, cut) in enumerate(parts):
            self.endings.check_bos(ids, name)
            flags = self._flags(text, split.prompt, ids, [len(prompt), *cuts])
            calls = row.is_chat and bool(text.answer[-1].get("tool_calls"))
            ids, added = self.endings.end(ids, chat=row.is_chat, calls=calls)
            if cut:
                ids, added = self.endings.without_end(ids, chat=row.is_chat), False
            if images:
                ids = images.ids(ids, images.orders[place])
            else:
                self.images.check_none(name, ids)
            answers[name] = Answer.ended(ids, flags, name)
            eos_added += added
        lead = self.endings.lead(prompt_ids)
        if images:
            prompt_ids = images.ids(prompt_ids, images.order)
        else:
            self.images.check_none("the prompt", prompt_ids)
        ids = {name: answer.ids for name, answer in answers.items()}
        fitted = fit(row.where, prompt_ids, ids, self.config, lead)
        kept = [each.cut(len(ids)) for each, ids in zip(answers.values(), fitted.answers)]
        if _alike([answer.ids for answer in kept]):
            raise Dropped(
                "the answers are the same once cut", "up to the last token that is scored"
            )
        if fitted.prompt_cut:  # the room of tokens that were cut off behind the last scored one
            ids = {name: answer.ids for name, answer in zip(answers, kept)}
            again = fit(row.where, prompt_ids, ids, self.config, lead)
            fitted = replace(fitted, prompt=again.prompt, prompt_cut=again.prompt_cut)
        final = [fitted.prompt, *(answer.ids for answer in kept)]
        return TOKENISED[row.kind](
            prompt_ids=fitted.prompt,
            **_columns(kept, row.kind),
            merged=int(split.merged),
            bos_added=int(bos_added),
            eos_added=eos_added,
            prompt_cut=fitted.prompt_cut,
            answers_cut=fitted.answers_cut,
            left_out=sum(text.left_out for text in texts),
            trailing=sum(map(_trails, row.answers.values())),
            bare=int(self._untold and not row.is_chat),
            images=images.stored(final) if images else None,
            image_tokens=sum(map(count_image_tokens, final)) if images else 0,
        )

    def _flags(
        self, text: Text, prompt_ids: list[int], ids: list[int], cuts: list[int]
    ) -> list[bool] | None:
        """Which of an answer's tokens are scored; None if all are. cuts: as for `offsets`."""
        if text.scored and not text.turns:
            return None
        flags = [text.scored] * len(ids)
        places = self.boundary.offsets(text.whole, [*prompt_ids, *ids], cuts)[len(prompt_ids) :]
        ends = [end for _, end in places]
        for start, stop, _ in text.turns:
            first, last = bisect_right(ends, start), bisect_right(ends, stop)
            if last < len(ids):
                last = self.endings.end_turn(ids, first, last)
            flags[first:last] = [not text.scored] * (last - first)
        return flags

    def _texts(self, row: Row) -> list[Text]:
        return [Text(row.prompt + answer, []) for answer in row.answers.values()]


def _check_unicode(texts: list[str]) -> None:
    """Raises BadRow. What is rendered has more than contents: systems, thinking, tools, arguments."""
    try:
        for text in texts:
            text.encode()
    except UnicodeEncodeError:
        raise BadRow("the chat is not Unicode text", "it has a lone surrogate") from None


class Answer(NamedTuple):
    """Token ids, and which of them are scored: the last one is. scored: None if all are."""

    ids: list[int]
    scored: list[bool] | None

    @classmethod
    def ended(cls, ids: list[int], flags: list[bool] | None, name: str) -> Answer:
        """flags: of the ids before they were given one end of turn. Raises BadRow."""
        if flags is None:
            return cls(ids, None)
        if not any(flags):
            raise BadRow(f"nothing of {name} is scored", "its thinking is left out by the template")
        flags = [*flags[: len(ids)], *flags[-1:] * (len(ids) - len(flags))]
        return cls(ids, flags).cut(len(ids))

    def cut(self, size: int) -> Answer:
        """The first `size` tokens, up to the last that is scored. Raises Dropped if none is."""
        if self.scored is None:
            return Answer(self.ids[:size], None)
        places = [place for place, scored in enumerate(self.scored[:size]) if scored]
        if not places:
            raise Dropped("nothing is scored once cut", f"{size} tokens of an answer fit")
        end = places[-1] + 1
        return Answer(self.ids[:end], None if len(places) == end else self.scored[:end])


def _trails(answer: str | Messages) -> bool:
    """Whether an answer has messages after the assistant's last."""
    return not isinstance(answer, str) and answer[-1]["role"] != "assistant"


def _columns(answers: list[Answer], kind: Kind) -> dict[str, Any]:
    """The fields of `Tokenised` that are about answers."""
    ids, flags = [answer.ids for answer in answers], [answer.scored for answer in answers]
    if kind.many:
        told = [each or [True] * len(own) for each, own in zip(flags, ids)]
        ids, flags = [ids], [told if any(flags) else None]
    return dict(zip(kind.ids[1:], ids)) | dict(zip(kind.scored, flags))


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
    `drop` and `error` never cut. No cut goes through an image, or between it and what is next to it.

    Raises:
        Dropped: too long under `drop`; an answer without tokens; answers that are the same tokens,
            or become so by the cut; a prompt whose images do not fit.
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
    answers = [answer[: whole_images(answer, room)] for answer in answers]
    if not all(answers):
        raise Dropped("an image does not fit", f"{room} tokens of an answer fit")
    if _alike(answers):
        raise Dropped("the answers are the same once cut", f"all keep {room} tokens")
    length = min(len(prompt), config.max_length - max(map(len, answers)))
    prompt_cut = len(prompt) - length
    if config.truncation == "keep_start":
        kept = prompt[:length]
        edge = kept[-1:]
    else:
        lead = min(lead, length) if prompt_cut else 0
        kept = [*prompt[:lead], *prompt[len(prompt) - length + lead :]]
        edge = kept[lead : lead + 1]
    if prompt_cut and (
        count_image_tokens(kept) < count_image_tokens(prompt) or min(edge, default=0) < 0
    ):
        raise Dropped(
            "an image does not fit",
            f"{length} tokens of the prompt fit, of {len(prompt)} with "
            f"{count_image_tokens(prompt)} of images; raise data.max_length",
        )
    return Fitted(kept, answers, prompt_cut, answers_cut)
