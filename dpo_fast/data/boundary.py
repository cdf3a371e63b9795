"""Where the token ids of prompt and answers begin and end.

The prompt must be an exact token prefix of prompt + answer. Most often its own ids are a prefix of
the whole text's ids. They are not where the tokenizer joins the prompt's last characters to the
answer's first. Then the boundary comes from the character offsets of the whole text's tokens: a
token that straddles it belongs to the answer, and is scored. With the vocabulary {a, b, c, bc}:

    prompt "ab", answer "c"      alone [a b]     whole [a bc]     prompt [a], answer [bc]

The prompt of a chat keeps its own ids even then, and the rest is tokenised by itself: generation begins
from exactly these ids, so that is where the model goes on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from itertools import chain, pairwise
from typing import Any, NamedTuple

from dpo_fast.data.verdicts import BadRow


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

    def split(
        self, prompt: str, *texts: str, keep: bool = False, starts: Sequence[Sequence[int]] = ()
    ) -> PromptAndAnswers:
        """Ids of one or more whole texts that begin with `prompt`. Raises BadRow.

        keep: the prompt keeps its own ids, as in a chat. Otherwise, if only some texts join a token
        across the boundary, the others' tokens of the same characters go to their answers too. All
        answers get the same prompt ids.
        starts: of each text the later characters at which generation goes on, and a token begins, too.
        """
        encoded = self.tokenizer(
            [prompt, *texts],
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        prompt_ids, *whole_ids = encoded["input_ids"]
        if keep and not self._marks_words:
            cuts = [[len(prompt), *each] for each in starts or [()] * len(texts)]
            whole_ids = list(map(self._kept, [prompt_ids] * len(texts), texts, whole_ids, cuts))
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
        self, prompt_ids: list[int], text: str, ids: list[int], cuts: Sequence[int]
    ) -> list[int]:
        """Ids of the text with a token beginning at each of the characters `cuts`."""
        apart = ids[: len(prompt_ids)] == prompt_ids
        if apart and (len(cuts) == 1 or set(cuts) <= set(next(zip(*self.offsets(text, ids))))):
            return ids
        parts = [text[begin:end] for begin, end in pairwise([*cuts, len(text)])]
        rests = self.tokenizer(parts, add_special_tokens=False, verbose=False)["input_ids"]
        return [*prompt_ids, *chain.from_iterable(rests)]

    def offsets(self, text: str, ids: list[int], cuts: Sequence[int] = ()) -> list[tuple[int, int]]:
        """Begin and end of each token among the characters of a text that was split. Raises BadRow.

        cuts: the prompt's end and `starts`, as they were for `split`.
        """
        whole = self._encoding(text)
        if whole.ids == ids:
            return whole.offsets
        places = [0, *cuts]
        parts = [self._encoding(text[a:b]) for a, b in pairwise([*places, len(text)])]
        if [index for part in parts for index in part.ids] != ids:
            raise BadRow("the prompt is not a token prefix", "the tokenizer's offsets do not apply")
        return [(a + at, b + at) for at, part in zip(places, parts) for a, b in part.offsets]

    @cached_property
    def _marks_words(self) -> bool:
        """Whether the tokenizer marks the first word of any text, so that no text goes on with one."""
        ids = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        return self.tokenizer.convert_ids_to_tokens(ids)[0].startswith(("▁", "Ġ"))

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
        return self._plain.encode(text, add_special_tokens=False)

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
