"""Where the token ids of prompt and answers begin and end.

The prompt must be an exact token prefix of prompt + answer. Most often its own ids are a prefix of
the whole text's ids. They are not where the tokenizer joins the prompt's last characters to the
answer's first. Then the boundary comes from the character offsets of the whole text's tokens: a
token that straddles it belongs to the answer, and is scored. With the vocabulary {a, b, c, bc}:

    prompt "ab", answer "c"      alone [a b]     whole [a bc]     prompt [a], answer [bc]

A sequence begins with at most one BOS, and an answer ends with exactly one end of turn.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cached_property
from typing import Any, NamedTuple

from dpo_fast.data.verdicts import BadRow
from dpo_fast.errors import UserError


class PromptAndAnswers(NamedTuple):
    """Token ids. merged: a token straddles the prompt's end."""

    prompt: list[int]
    answers: list[list[int]]
    merged: bool


class _Cut(NamedTuple):
    """One whole text, cut at the end of the prompt.

    ids: of the whole text; the first `end` of them are the prompt's.
    straddle: the character at which a token that straddles the prompt's end begins; the prompt's
        length where there is none.
    """

    ids: list[int]
    end: int
    straddle: int


class PromptBoundary:
    """Splits texts into the ids of prompt and answers with one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def split(self, prompt: str, *texts: str) -> PromptAndAnswers:
        """Ids of one or more whole texts that begin with `prompt`. Raises BadRow.

        All answers get the same prompt ids. If only some texts join a token across the boundary,
        the others' tokens of the same characters go to their answers too.
        """
        encoded = self.tokenizer(
            [prompt, *texts],
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        prompt_ids, *whole_ids = encoded["input_ids"]
        cuts = [self._cut(prompt, prompt_ids, *pair) for pair in zip(texts, whole_ids)]
        prompts = [cut.ids[: cut.end] for cut in cuts]
        shared = min(_common(prompts[0], each) for each in prompts)
        straddle = min(cut.straddle for cut in cuts)
        for text, cut in zip(texts, cuts):
            if cut.end > shared and self._offsets(text, cut.ids)[shared][0] < straddle:
                raise BadRow(
                    "the answers tokenise the prompt differently",
                    f"from token {shared} of the prompt on",
                )
        answers = [cut.ids[shared:] for cut in cuts]
        return PromptAndAnswers(cuts[0].ids[:shared], answers, merged=straddle < len(prompt))

    def _cut(self, prompt: str, prompt_ids: list[int], text: str, ids: list[int]) -> _Cut:
        if ids[: len(prompt_ids)] == prompt_ids:
            return _Cut(ids, len(prompt_ids), len(prompt))
        offsets = self._offsets(text, ids)
        past = (index for index, (_, end) in enumerate(offsets) if end > len(prompt))
        end = next(past, len(ids))
        straddle = min(offsets[end][0], len(prompt)) if end < len(ids) else len(prompt)
        return _Cut(ids, end, straddle)

    def _offsets(self, text: str, ids: list[int]) -> list[tuple[int, int]]:
        if not getattr(self.tokenizer, "is_fast", False):
            raise BadRow(
                "the prompt is not a token prefix",
                "this tokenizer has no character offsets to find the boundary by; use a fast one",
            )
        encoding = self._plain.encode(text, add_special_tokens=False)
        if encoding.ids != ids:
            raise BadRow("the prompt is not a token prefix", "the tokenizer's offsets do not apply")
        return encoding.offsets

    @cached_property
    def _plain(self) -> Any:
        """The tokenizer without its post-processor, which may trim white space off the offsets."""
        from tokenizers import Tokenizer

        backend = self.tokenizer.backend_tokenizer
        state = json.loads(backend.to_str()) | {
            "post_processor": None,
            "truncation": None,
            "padding": None,
        }
        plain = Tokenizer.from_str(json.dumps(state))
        plain.encode_special_tokens = backend.encode_special_tokens
        return plain


def _common(left: list[int], right: list[int]) -> int:
    """Length of the common beginning."""
    pairs = enumerate(zip(left, right))
    return next((index for index, (a, b) in pairs if a != b), min(len(left), len(right)))


class Endings:
    """The special tokens of one tokenizer that begin and end sequences.

    eos_ids: end-of-turn ids beside the tokenizer's EOS, as in a model's generation config.
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
        """The prompt, with one BOS if the tokenizer uses it, and whether BOS had to be added."""
        bos = self.bos_id
        start = 0
        while bos is not None and prompt_ids[start : start + 2] == [bos, bos]:
            start += 1
        if self.adds_bos and prompt_ids[start : start + 1] != [bos]:
            return [bos, *prompt_ids[start:]], True
        return prompt_ids[start:], False

    def end(self, answer_ids: list[int], *, chat: bool) -> tuple[list[int], bool]:
        """The answer with one end of turn, and whether EOS had to be added.

        The tail is the white space and the special tokens after the answer's last word. What
        follows the first end of turn in the tail is cut off. If a chat template ends turns with a
        special token that is neither the tokenizer's EOS nor among eos_ids, the last special token
        of the tail is the end of turn. Raises UserError when EOS is needed and the tokenizer has
        none.
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
