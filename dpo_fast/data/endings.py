"""At most one BOS at the start of a sequence; exactly one end of turn at the end of an answer."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Any

from dpo_fast.errors import UserError


class Endings:
    """The special tokens of one tokenizer that begin and end sequences.

    `eos_ids` are end-of-turn ids beside the tokenizer's EOS, as in a model's generation config.
    """

    def __init__(self, tokenizer: Any, eos_ids: Iterable[int], add_eos: bool) -> None:
        self.tokenizer = tokenizer
        self.add_eos = add_eos
        self.bos_id: int | None = tokenizer.bos_token_id
        self.eos_id: int | None = tokenizer.eos_token_id
        self.end_ids = {self.eos_id, *eos_ids} - {None}

    @cached_property
    def adds_bos(self) -> bool:
        """Whether the tokenizer itself puts BOS before a text."""
        probe = self.tokenizer("a", add_special_tokens=True)["input_ids"]
        return self.bos_id is not None and probe[:1] == [self.bos_id]

    @cached_property
    def _special_ids(self) -> set[int]:
        """Special tokens that could end a turn."""
        added = self.tokenizer.added_tokens_decoder.items()
        special = {index for index, token in added if token.special}
        special |= set(self.tokenizer.all_special_ids)
        others = (self.bos_id, self.tokenizer.pad_token_id, self.tokenizer.unk_token_id)
        return special - (set(others) - self.end_ids)

    def begin(self, prompt_ids: list[int]) -> tuple[list[int], bool]:
        """The prompt with one BOS if the tokenizer uses one; and whether it had to be put there."""
        bos = self.bos_id
        start = 0
        while bos is not None and prompt_ids[start : start + 2] == [bos, bos]:
            start += 1
        if self.adds_bos and prompt_ids[start : start + 1] != [bos]:
            return [bos, *prompt_ids[start:]], True
        return prompt_ids[start:], False

    def end(self, answer_ids: list[int], *, chat: bool) -> tuple[list[int], bool]:
        """The answer with one end of turn, and whether EOS had to be put there.

        What follows the first end of turn of the tail (white space and special tokens that come
        after the answer's last word) is cut off. A chat template may end turns with a special
        token that is neither the tokenizer's EOS nor among eos_ids: the tail's last one counts.
        Raises UserError when EOS is needed and the tokenizer has none.
        """
        tail = self._tail(answer_ids, chat)
        ends = [i for i in range(tail, len(answer_ids)) if answer_ids[i] in self.end_ids]
        if ends:
            return answer_ids[: ends[0] + 1], False
        if chat:
            last = range(len(answer_ids) - 1, tail - 1, -1)
            found = next((i for i in last if answer_ids[i] in self._special_ids), None)
            if found is not None:
                return answer_ids[: found + 1], False
        if not self.add_eos:
            return answer_ids, False
        if self.eos_id is None:
            raise UserError(
                "data.add_eos=true, but the tokenizer has no EOS token; set its eos_token, or set "
                "data.add_eos=false"
            )
        return [*answer_ids, self.eos_id], True

    def _tail(self, ids: list[int], chat: bool) -> int:
        """Index of the first token after the last word."""
        marks = self.end_ids | self._special_ids if chat else self.end_ids
        index = len(ids)
        while index and (ids[index - 1] in marks or self._is_space(ids[index - 1])):
            index -= 1
        return index

    def _is_space(self, token_id: int) -> bool:
        return not self.tokenizer.decode([token_id]).strip()
