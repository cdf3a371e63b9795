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
from itertools import chain, pairwise
from typing import Any, NamedTuple

from dpo_fast.data.verdicts import BadRow

MANY = 1 << 16  # characters of a row's texts
BEFORE = ("\n", "|")  # texts that join with few others


class PromptAndAnswers(NamedTuple):
    """Token ids. merged: a token straddles the prompt's end."""

    prompt: list[int]
    answers: list[list[int]]
    merged: bool

    def from_first_token(self) -> PromptAndAnswers:
        """One answer without a prompt, with its first token, which nothing predicts, for the prompt."""
        (answer,) = self.answers
        return PromptAndAnswers(answer[:1], [answer[1:]], self.merged)


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
        self._encodings: dict[str, Any] = {}  # of the last texts that were split

    def split(
        self, prompt: str, *texts: str, keep: bool = False, starts: Sequence[Sequence[int]] = ()
    ) -> PromptAndAnswers:
        """Ids of one or more whole texts that begin with `prompt`. Raises BadRow.

        keep: the prompt keeps its own ids, as in a chat. Otherwise, if only some texts join a token
        across the boundary, the others' tokens of the same characters go to their answers too. All
        answers get the same prompt ids.
        starts: of each text the later characters at which generation goes on, and a token begins, too.
        """
        prompt_ids, *whole_ids = self._all_ids([prompt, *texts])
        later = starts or [()] * len(texts)

        def kept() -> PromptAndAnswers:
            return self._kept(prompt, prompt_ids, texts, whole_ids, later)

        def shared() -> PromptAndAnswers:
            return self._shared(prompt, prompt_ids, texts, whole_ids)

        first, second = (kept, shared) if keep else (shared, kept)
        try:
            return first()
        except BadRow as refusal:
            try:
                return second()
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
            if cut.end > shared and self.offsets(text, cut.ids)[shared][0] < straddle:
                raise BadRow(
                    "the answers tokenise the prompt differently",
                    f"from token {shared} of the prompt on",
                )
        answers = [cut.ids[shared:] for cut in cuts]
        return PromptAndAnswers(cuts[0].ids[:shared], answers, merged=straddle < len(prompt))

    def _kept(
        self,
        prompt: str,
        prompt_ids: list[int],
        texts: Sequence[str],
        whole_ids: list[list[int]],
        starts: Sequence[Sequence[int]],
    ) -> PromptAndAnswers:
        """The prompt's own ids. A text without them, or without a token at each start, is cut there."""
        length, answers = len(prompt_ids), []
        for text, ids, later in zip(texts, whole_ids, starts):
            whole = ids[:length] == prompt_ids
            if whole and later:
                whole = set(later) <= {begin for begin, _ in self.offsets(text, ids)}
            parts = pairwise([len(prompt), *later, len(text)])
            cut = (self._going_on(text[begin:end]) for begin, end in parts)
            answers.append(ids[length:] if whole else [*chain.from_iterable(cut)])
        return PromptAndAnswers(prompt_ids, answers, merged=False)

    def _going_on(self, rest: str) -> list[int]:
        """Ids of a text that goes on after another one. Raises BadRow."""
        before = self._before(rest)
        return self._ids(before + rest)[len(self._ids(before)) :]

    def _before(self, rest: str) -> str:
        """A text that leaves its tokens to `rest` after it. Raises BadRow if none of a few does.

        SentencePiece puts a space before the first word of any text, and so another text goes first.
        """
        for before in BEFORE if self._marks_words else ("",):
            own = self._ids(before)
            if self._ids(before + rest)[: len(own)] == own:
                return before
        raise BadRow(
            "the prompt is not a token prefix",
            "the tokenizer joins the answer to what is before it",
        )

    def offsets(self, text: str, ids: list[int], cuts: Sequence[int] = ()) -> list[tuple[int, int]]:
        """Begin and end of each token among the characters of a text that was split. Raises BadRow.

        cuts: the prompt's end and `starts`, as they were for `split`.
        """
        whole = self._encoding(text)
        if whole.ids == ids:
            return whole.offsets
        found, offsets = [], []
        for begin, end in pairwise([0, *cuts, len(text)]):
            part = text[begin:end]
            before = self._before(part) if found else ""
            encoding, skipped = self._encoding(before + part), len(self._encoding(before).ids)
            found += encoding.ids[skipped:]
            moved = begin - len(before)
            offsets += [(a + moved, b + moved) for a, b in encoding.offsets[skipped:]]
        if found != ids:
            raise BadRow("the prompt is not a token prefix", "the tokenizer's offsets do not apply")
        return offsets

    @cached_property
    def _marks_words(self) -> bool:
        """Whether the tokenizer marks the first word of any text."""
        return self.tokenizer.convert_ids_to_tokens(self._ids("a"))[0].startswith(("▁", "Ġ"))

    def _all_ids(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text. Where it can, the encodings are kept: most rows need offsets of them.

        An encoding takes about 150 bytes for a byte of text, so that of long ones one is there at a time.
        """
        self._encodings = {}
        if self._is_plain and sum(map(len, texts)) > MANY:
            return [self._plain.encode(text, add_special_tokens=False).ids for text in texts]
        if self._is_plain:
            self._encodings = dict(
                zip(texts, self._plain.encode_batch(texts, add_special_tokens=False))
            )
            return [self._encodings[text].ids for text in texts]
        encoded = self.tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return encoded["input_ids"]

    @cached_property
    def _is_plain(self) -> bool:
        """Whether the tokenizer's call does nothing but what its backend does."""
        from transformers import PreTrainedTokenizerFast as Fast

        names = ("__call__", "_encode_plus", "_tokenizer", "backend_tokenizer")
        kind = type(self.tokenizer)
        own, usual = ([getattr(each, name, None) for name in names] for each in (kind, Fast))
        return issubclass(kind, Fast) and own == usual

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _cut(self, prompt: str, prompt_ids: list[int], text: str, ids: list[int]) -> _Cut:
        if ids[: len(prompt_ids)] == prompt_ids:
            return _Cut(ids, len(prompt_ids), len(prompt))
        offsets = self.offsets(text, ids)
        past = (index for index, (_, end) in enumerate(offsets) if end > len(prompt))
        end = next(past, len(ids))
        straddle = min(offsets[end][0], len(prompt)) if end < len(ids) else len(prompt)
        return _Cut(ids, end, straddle)

    def _encoding(self, text: str) -> Any:
        if not getattr(self.tokenizer, "is_fast", False):
            raise BadRow(
                "no character offsets",
                "this tokenizer has none to find the ends of prompt and turns by; use a fast one",
            )
        known = self._encodings.get(text)
        return known or self._plain.encode(text, add_special_tokens=False)

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
        own = getattr(self.tokenizer, "split_special_tokens", None)
        plain.encode_special_tokens = backend.encode_special_tokens if own is None else own
        return plain


def common_length(left: list[int], right: list[int]) -> int:
    """Length of the common beginning."""
    pairs = enumerate(zip(left, right))
    return next((index for index, (a, b) in pairs if a != b), min(len(left), len(right)))
