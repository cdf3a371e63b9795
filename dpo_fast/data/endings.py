"""The special tokens that begin and end sequences.

A text begins with what the tokenizer puts before one, once: BOS, or [gMASK]<sop> for GLM. A chat begins
with what its template puts there. An answer ends with exactly one end of turn, the template's: what it
writes after an answer, whether or not another turn follows. That may be an added token of any sort, the
padding token too.

    template   after the last answer    before the next question            end of turn
    ChatML     <|im_end|>\\n             <|im_end|>\\n<|im_start|>user         <|im_end|>
    Phi 3      <|end|>\\n<|endoftext|>   <|end|>\\n<|user|>                    <|end|>
    gpt-oss    <|return|>               <|end|><|start|>user                <|return|>
    GLM 4.5    nothing                  <|user|>, an EOS of the model       <|user|>
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Any

from dpo_fast.data.boundary import common_length
from dpo_fast.data.chat import ChatTemplate
from dpo_fast.data.verdicts import BadRow
from dpo_fast.errors import UserError


class Endings:
    """The special tokens of one tokenizer and chat template that begin and end sequences.

    eos_ids: end-of-turn ids beside the tokenizer's EOS, as in a model's generation config.
    """

    def __init__(
        self, tokenizer: Any, eos_ids: Iterable[int], add_eos: bool, chat: ChatTemplate
    ) -> None:
        self.tokenizer, self.chat = tokenizer, chat
        self.add_eos = add_eos
        self.bos_id: int | None = tokenizer.bos_token_id
        self.eos_id: int | None = tokenizer.eos_token_id
        self.end_ids = {self.eos_id, *eos_ids} - {None}
        self._spaces: dict[int, bool] = {}  # decoding the last token of every answer takes a while

    @cached_property
    def start_ids(self) -> list[int]:
        """What the tokenizer itself puts before a text."""
        whole = self.tokenizer("a", add_special_tokens=True)["input_ids"]
        plain = self._ids("a")
        starts = range(len(whole) - len(plain) + 1)
        start = next((i for i in starts if whole[i : i + len(plain)] == plain), 0)
        return whole[:start]

    def begin(self, prompt_ids: list[int], *, chat: bool) -> tuple[list[int], bool]:
        """The prompt, begun as the tokenizer begins texts, and whether tokens had to be added.

        A chat begins as its template begins it: inference adds nothing to a rendered chat.
        """
        bos, start = self.bos_id, [] if chat else self.start_ids
        first = 0
        while bos is not None and prompt_ids[first : first + 2] == [bos, bos]:
            first += 1
        ids = prompt_ids[first:]
        if ids[: len(start)] == start:
            return ids, False
        there = next((n for n in range(len(start), 0, -1) if ids[:n] in (start[:n], start[-n:])), 0)
        return [*start, *ids[there:]], True

    def lead(self, prompt_ids: list[int]) -> int:
        """How many of the first tokens begin the sequence, and stay when the prompt is cut."""
        start = self.start_ids
        if start and prompt_ids[: len(start)] == start:
            return len(start)
        return int(self.bos_id is not None and prompt_ids[:1] == [self.bos_id])

    def check_bos(self, answer_ids: list[int], field: str) -> None:
        """Raises BadRow for a BOS in an answer.

        A BOS that also begins turns (SmolLM2: <|im_start|>) may stand inside, but not begin the answer.
        """
        bos = self.bos_id
        if bos is None or bos in self.end_ids or bos not in answer_ids:
            return
        first = next((index for index in answer_ids if not self._is_space(index)), bos)
        if self._bos_begins_turns and first != bos:
            return
        raise BadRow(f"BOS inside {field}", "it begins a text and would be scored here")

    @cached_property
    def _bos_begins_turns(self) -> bool:
        return self.chat.exists and self.bos_id in self._ids(self.chat.two_turns)[1:]

    def end(
        self, answer_ids: list[int], *, chat: bool, calls: bool = False
    ) -> tuple[list[int], bool]:
        """The answer with one end of turn, and whether it had to be added.

        The tail is the white space and the special tokens after the answer's last word. What
        follows the first end of turn in the tail is cut off. In a chat that is the template's: an
        EOS that the content brings goes. If a turn of a chat ends in another way (gpt-oss: <|call|>),
        its last special token is the end of turn. calls: the turn calls tools.

        Raises UserError when EOS is needed and the tokenizer has none.
        """
        ends = self.end_ids | ({self._turn_end} if chat else set())
        tail = self._tail(answer_ids, ends | self._special_ids if chat else ends)
        if chat and self._turn_end in answer_ids[tail:]:
            last = answer_ids.index(self._turn_end, tail)
            others = [index for index in answer_ids[tail:last] if index not in ends]
            return [*answer_ids[:tail], *others, self._turn_end], False
        found = self._end(answer_ids, tail, len(answer_ids), ends, chat)
        if found is not None:
            return answer_ids[: found + 1], False
        if not self.add_eos:
            return answer_ids, False
        end = self._next_turn("tool" if calls else "user") if chat else None
        end = self.eos_id if end is None else end
        if end is None:
            raise UserError(
                "data.add_eos=true, but the tokenizer has no EOS token; set its eos_token, or set "
                "data.add_eos=false"
            )
        return [*answer_ids, end], True

    def without_end(self, answer_ids: list[int], *, chat: bool) -> list[int]:
        """The answer without its end of turn: one that was cut off never had it."""
        return (
            answer_ids[:-1]
            if answer_ids[-1:] and answer_ids[-1] in self.stop_ids(chat=chat)
            else answer_ids
        )

    def stop_ids(self, *, chat: bool) -> list[int]:
        """The tokens at which generation stops: every end of turn that `end` knows, sorted."""
        turn = {self._turn_end} if chat else set()
        return sorted((self.end_ids | turn) - {None})

    def end_turn(self, ids: list[int], first: int, last: int) -> int:
        """Where a turn of a chat, the tokens from first to last, ends with its end of turn, if it has one.

        That may be the next token, if generation stops there (GLM).
        """
        ends = self.end_ids | {self._turn_end}
        tail = first + self._tail(ids[first:last], ends | self._special_ids)
        if self._turn_end in ids[tail : last + 1]:
            return ids.index(self._turn_end, tail) + 1
        found = self._end(ids[: last + 1], tail, last, ends, chat=True)
        return last if found is None else found + 1

    def _end(
        self, ids: list[int], tail: int, size: int, ends: set[int | None], chat: bool
    ) -> int | None:
        """Place of the end of turn in ids, of which the first `size` are of the turn."""
        found = next((i for i in range(tail, len(ids)) if ids[i] in ends), None)
        if found is None and chat:
            places = reversed(range(tail, size))
            found = next((i for i in places if ids[i] in self._special_ids), None)
        return found

    @cached_property
    def _turn_end(self) -> int | None:
        """The token with which the template ends an answer; None if it writes none."""
        after = self._ids(self.chat.after_answer(None))
        before_next = self._ids(self.chat.after_answer("user"))
        both = after[: common_length(after, before_next)]
        prompt, bare = (self._ids(self.chat.after_question(generate)) for generate in (True, False))
        begins = prompt[common_length(prompt, bare) :]
        for ids in (both, after):
            known = self.tokenizer.added_tokens_decoder
            added = [index for index in ids if index in known and index not in begins]
            if added:
                return next((index for index in added if index in self.end_ids), added[-1])
        return None

    def _next_turn(self, role: str) -> int | None:
        """The token that begins the next turn, if the template ends no turn and generation stops at it."""
        if self._turn_end is not None:
            return None
        first = self._ids(self.chat.after_answer(role))[:1]
        return first[0] if first and first[0] in self.end_ids else None

    @cached_property
    def _special_ids(self) -> set[int]:
        """Special tokens that could end a turn."""
        added = self.tokenizer.added_tokens_decoder.items()
        special = {index for index, token in added if token.special}
        special |= set(self.tokenizer.all_special_ids)
        others = (self.bos_id, self.tokenizer.pad_token_id, self.tokenizer.unk_token_id)
        return special - (set(others) - self.end_ids)

    def _tail(self, ids: list[int], marks: set[int | None]) -> int:
        """Index of the first token after the last word."""
        index = len(ids)
        while index and (ids[index - 1] in marks or self._is_space(ids[index - 1])):
            index -= 1
        return index

    def _is_space(self, token_id: int) -> bool:
        if token_id not in self._spaces:
            self._spaces[token_id] = not self.tokenizer.decode([token_id]).strip()
        return self._spaces[token_id]

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]
