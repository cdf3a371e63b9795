"""Prompts to token ids, and sampled ids back to the texts and the ids that `train` makes of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from dpo_fast.data.config import DataConfig
from dpo_fast.data.generation_prompt import generation_prompt
from dpo_fast.data.images.known import KnownImages
from dpo_fast.data.images.tokens import text_ids
from dpo_fast.data.template_file import check_template_used
from dpo_fast.data.thinking import MARKS, find_opening
from dpo_fast.data.tokenise import RowTokeniser
from dpo_fast.data.verdicts import BadRow, Dropped
from dpo_fast.errors import UserError
from dpo_fast.generation.channels import CHANNEL, MESSAGE, without_channels
from dpo_fast.generation.prompts import Prompt


@dataclass(frozen=True)
class Tokens:
    """A prompt with a completion as `train` would score it.

    scored: which of the answer's tokens are; None: all.
    """

    prompt_ids: list[int]
    answer_ids: list[int]
    scored: list[bool] | None = None


class PromptCodec:
    """Between prompts and token ids, with one tokenizer and one section `data`.

    tokenizer: a transformers tokenizer. eos_ids: end-of-turn ids beside its EOS, as in the model's
    generation config.
    """

    def __init__(self, tokenizer: Any, config: DataConfig, eos_ids: Iterable[int] = ()) -> None:
        self.tokenizer = tokenizer
        self.rows = RowTokeniser(tokenizer, config, eos_ids)
        self.images = KnownImages(self.rows.images.model, self.rows.images.store)

    def encode(self, prompt: Prompt) -> list[int]:
        """The ids that a completion follows; those of images are below 0 (`data/images/tokens.py`).

        Raises BadRow, and UserError for what no row can mend.
        """
        row = prompt.answered("")
        text = generation_prompt(self.rows.chat, row) if prompt.is_chat else prompt.prompt
        images = self.rows.images.of(row) if prompt.images else None
        if images:
            text, _ = images.texts(row, text, [])
        ids = self._ids(text)
        ids, _ = self.rows.endings.begin(ids, chat=prompt.is_chat)
        if not ids and self.rows.endings.bos_id is not None:
            ids = [self.rows.endings.bos_id]
        if not ids:
            raise BadRow(
                "no prompt token",
                "the prompt is empty, and the tokenizer has no BOS to predict the first token from",
            )
        if images is None:
            self.rows.images.check_none("the prompt", ids)
            return ids
        ids = images.ids(ids, images.order)
        self.images.note(images.stored([ids]))
        return ids

    def stop_ids(self, prompt: Prompt) -> list[int]:
        """The tokens that end a completion."""
        return self.rows.endings.stop_ids(chat=prompt.is_chat)

    def decode(self, prompt: Prompt, prompt_ids: list[int], ids: list[int]) -> str:
        """The text of a completion. Special tokens are left out, but for the marks of thinking.

        It is decoded after its prompt: SentencePiece takes the space off the first word of any text. In a
        chat what the template itself writes before an answer is left out.
        """
        if self._has_channels and (text := without_channels(self._text(ids))) is not None:
            return text
        header = self._lead_ids if prompt.is_chat and self._begins_a_turn(prompt) else []
        ids = ids[len(header) :] if ids[: len(header)] == header else ids
        before, kept = self._plain(prompt_ids), self._plain(ids)
        start = self._text(before)
        whole = self._text([*before, *kept])
        text = whole[len(start) :] if whole.startswith(start) else self._text(kept)
        return self.without_lead(prompt, text)

    def cut_off(self, prompt: Prompt, prompt_ids: Sequence[int], text: str) -> str:
        """The text of a completion that does not end.

        Where its prompt opens thinking that it does not close, the mark stands before it: without one it
        would be an answer.
        """
        opening = find_opening(self._text(prompt_ids)) if prompt.is_chat else None
        if opening is None or opening.closed or opening.close in text:
            return text
        return f"{opening.open}{opening.gap}{text}"

    def without_lead(self, prompt: Prompt, text: str) -> str:
        """What follows a chat's prompt, without what the template itself writes before an answer."""
        lead = self.rows.chat.lead if prompt.is_chat and self._begins_a_turn(prompt) else None
        return text.removeprefix(lead) if lead else text

    def text(self, prompt_ids: Sequence[int]) -> str:
        """A prompt as text, without the BOS that a tokenizer puts before it."""
        bos = self.rows.endings.bos_id
        return self._text(
            prompt_ids[1:] if bos is not None and prompt_ids[0] == bos else prompt_ids
        )

    def sequence(self, prompt: Prompt, completion: str, unfinished: bool = False) -> Tokens:
        """The ids that `train` makes of a completion. Raises BadRow and Dropped.

        unfinished: it was cut off, and has no end of turn.
        """
        found = self.rows(prompt.answered(completion, unfinished))
        if found.prompt_cut or found.answers_cut:
            raise Dropped("longer than data.max_length", "it would be cut")
        return Tokens(found.prompt_ids, found.completion_ids, found.completion_scored)

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raises UserError for an option of the section that no prompt can honour."""
        check_template_used(self.rows.config, any(each.is_chat for each in prompts))

    def is_bare(self, prompts: Sequence[Prompt]) -> bool:
        """Whether texts go to a chat model as they stand, and nobody said that they shall."""
        untold = self.rows.config.apply_chat_template == "auto" and self.rows.chat.exists
        return untold and not all(each.is_chat for each in prompts)

    @staticmethod
    def _begins_a_turn(prompt: Prompt) -> bool:
        return not prompt.prompt or prompt.prompt[-1]["role"] != "assistant"

    @cached_property
    def _left_out(self) -> set[int]:
        marks = {mark.strip() for pair in MARKS for mark in pair}
        special = {*self.tokenizer.all_special_ids, *self._special_added}
        names = {index: self.tokenizer.convert_ids_to_tokens(index) for index in special}
        return {index for index, name in names.items() if not any(name in mark for mark in marks)}

    @cached_property
    def _lead_ids(self) -> list[int]:
        """What the template writes before an answer, where that has special tokens."""
        ids = self._ids(self.rows.chat.lead or "")
        return ids if set(ids) & self._left_out else []

    @cached_property
    def _has_channels(self) -> bool:
        return CHANNEL in self.rows.chat.source and MESSAGE in self.rows.chat.source

    @property
    def _special_added(self) -> set[int]:
        added = self.tokenizer.added_tokens_decoder
        return {index for index, token in added.items() if token.special}

    def _plain(self, ids: Sequence[int]) -> list[int]:
        return [index for index in ids if index not in self._left_out]

    def _text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(
            text_ids(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    def _ids(self, text: str) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise BadRow("the prompt is not Unicode text", "it has a lone surrogate") from None
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


@dataclass(frozen=True)
class Encoded:
    """Prompts that fit, with their ids.

    places: of each in the list of all. dropped: (where, reason) of the others.
    """

    places: list[int]
    ids: list[list[int]]
    dropped: list[tuple[str, str]]


def encode_all(
    codec: PromptCodec, prompts: Sequence[Prompt], room: int, limits: str, refuse: bool, skip: bool
) -> Encoded:
    """Token ids of all prompts that have at most `room` of them.

    limits: what sets the room, in words. refuse: a longer one is an error. skip: bad ones are left out.

    Raises:
        UserError: a prompt that the template refuses, one that is too long, or none that fits.
    """
    found = Encoded([], [], [])
    for place, prompt in enumerate(prompts):
        try:
            ids = codec.encode(prompt)
        except BadRow as verdict:
            if not skip:
                raise UserError(
                    f"{prompt.where}: {verdict}. Mend the row, or set data.on_bad_row=skip"
                ) from None
            found.dropped.append((prompt.where, str(verdict)))
            continue
        if len(ids) <= room:
            found.places.append(place)
            found.ids.append(ids)
            continue
        reason = f"its prompt has {len(ids)} tokens, and {limits} leave room for {room}"
        if refuse:
            raise UserError(
                f"{prompt.where}: {reason}; lower sample.max_new_tokens, raise data.max_length as far as "
                "the model has positions, or set sample.long_prompts=drop"
            )
        found.dropped.append((prompt.where, reason))
    if not found.places:
        where, reason = found.dropped[0]
        raise UserError(f"none of {len(prompts)} prompts can be completed; {where}: {reason}")
    return found
