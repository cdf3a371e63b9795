"""Where the token ids of prompt and answers begin and end.

The prompt must be an exact token prefix of prompt + answer. Most often its own ids are a prefix of
the whole text's ids. They are not where the tokenizer joins the prompt's last characters to the
answer's first. Then the boundary comes from the character offsets of the whole text's tokens: a
token that straddles it belongs to the answer, and is scored. With the vocabulary {a, b, c, bc}:

    prompt "ab", answer "c"      alone [a b]     whole [a bc]     prompt [a], answer [bc]

The prompt of a chat keeps its own ids even then, and the rest is tokenised by itself: generation begins
from exactly these ids, so that is where the model goes on. So does the prompt of a text if its answers
leave it different tokens, or if the tokenizer has no offsets:

    prompt "x\\n\\n", answer " yes"   [x \\n\\n Ġyes]
                    answer "no"     [x \\n \\n no]         prompt [x \\n\\n], answers [Ġyes] and [no]
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

from dpo_fast.data.verdicts import BadRow

BEFORE = ("\n", "|")  # texts that join with few others


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

    def split(self, prompt: str, *texts: str, keep: bool = False) -> PromptAndAnswers:
        """Ids of one or more whole texts that begin with `prompt`. Raises BadRow.

        keep: the prompt keeps its own ids, as in a chat. Otherwise, if only some texts join a token
        across the boundary, the others' tokens of the same characters go to their answers too. All
        answers get the same prompt ids.
        """
        encoded = self.tokenizer(
            [prompt, *texts],
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        prompt_ids, *whole_ids = encoded["input_ids"]
        given = prompt, prompt_ids, texts, whole_ids
        first, second = (self._kept, self._shared) if keep else (self._shared, self._kept)
        try:
            return first(*given)
        except BadRow as refusal:
            try:
                return second(*given)
            except BadRow:
                raise refusal from None

    def _shared(
        self, prompt: str, prompt_ids: list[int], texts: Sequence[str], whole_ids: list[list[int]]
    ) -> PromptAndAnswers:
        """The tokens of the whole texts. Raises BadRow if they part before the prompt's end."""
        cuts = [self._cut(prompt, prompt_ids, *pair) for pair in zip(texts, whole_ids)]
        prompts = [cut.ids[: cut.end] for cut in cuts]
        shared = min(common_length(prompts[0], each) for each in prompts)
        straddle = min(cut.straddle for cut in cuts)
        for text, cut in zip(texts, cuts):
            if cut.end > shared and self._offsets(text, cut.ids)[shared][0] < straddle:
                raise BadRow(
                    "the answers tokenise the prompt differently",
                    f"from token {shared} of the prompt on",
                )
        answers = [cut.ids[shared:] for cut in cuts]
        return PromptAndAnswers(cuts[0].ids[:shared], answers, merged=straddle < len(prompt))

    def _kept(
        self, prompt: str, prompt_ids: list[int], texts: Sequence[str], whole_ids: list[list[int]]
    ) -> PromptAndAnswers:
        """The prompt's own ids. A text that does not begin with them has its rest tokenised alone."""
        length, answers = len(prompt_ids), []
        for text, ids in zip(texts, whole_ids):
            whole = ids[:length] == prompt_ids
            answers.append(ids[length:] if whole else self._going_on(text[len(prompt) :]))
        return PromptAndAnswers(prompt_ids, answers, merged=False)

    def _going_on(self, rest: str) -> list[int]:
        """Ids of a text that goes on after another one. Raises BadRow if they cannot be told.

        SentencePiece puts a space before the first word of any text, and so another text goes first.
        """
        for before in BEFORE if self._marks_words else ("",):
            own, ids = self._ids(before), self._ids(before + rest)
            if ids[: len(own)] == own:
                return ids[len(own) :]
        raise BadRow(
            "the prompt is not a token prefix",
            "the tokenizer joins the answer to what is before it",
        )

    @cached_property
    def _marks_words(self) -> bool:
        """Whether the tokenizer marks the first word of any text."""
        return self.tokenizer.convert_ids_to_tokens(self._ids("a"))[0].startswith(("▁", "Ġ"))

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

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


def common_length(left: list[int], right: list[int]) -> int:
    """Length of the common beginning."""
    pairs = enumerate(zip(left, right))
    return next((index for index, (a, b) in pairs if a != b), min(len(left), len(right)))
