"""Completions after the prompts of other examples: KTO estimates its kl on them.

Example i of a global batch keeps its prompt and gets the completion of example i - 1, the first
that of the last (arXiv 2402.01306 section 4.1). Of pairs, both answers move on in this way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from dpo_fast.data.config import IMAGES
from dpo_fast.data.images.tokens import whole_images
from dpo_fast.data.kinds import ExampleLengths, Kind


def partners(
    batch: Sequence[int], size: int, prompts: Sequence[int] | None = None
) -> list[tuple[int, int]]:
    """Each example of a global batch with the one whose completion it gets.

    An epoch may end with a global batch of one example. It gets the completion of the next of the data.

    size: examples of the data, at least 2.
    prompts: the number of each example's prompt, where examples of one prompt are brought together. Then
        each gets the completion of another prompt, unless more than half of the batch have its prompt.
    """
    if len(batch) == 1:
        return [(batch[0], (batch[0] + 1) % size)]
    shift = 1
    if prompts is not None:
        places = sorted(range(len(batch)), key=lambda place: prompts[place])
        batch, shift = [batch[place] for place in places], max(Counter(prompts).values())
        shift = shift % len(batch) or 1
    return list(zip(batch, [*batch[-shift:], *batch[:-shift]]))


def mismatched(example: Mapping, other: Mapping, kind: Kind, max_length: int) -> dict:
    """An example with the other's completions, cut to max_length tokens with the prompt.

    If nothing that is scored is left of one, it counts with log-probs of 0.
    """
    room = max_length - len(example["prompt_ids"])
    names = (*kind.ids[1:], *kind.scored)
    own = {name: value for name, value in example.items() if name not in names}
    images = [*(example.get(IMAGES) or ()), *(other.get(IMAGES) or ())]
    own |= {IMAGES: images} if images else {}
    return own | {name: _cut(other, name, room) for name in names if name in other}


def _cut(other: Mapping, name: str, room: int) -> list | None:
    """The ids of a completion, or its flags, without a part of an image at the end."""
    values = other[name]
    if not values or isinstance(values[0], list):
        return values and values[:room]
    ids = other[name.replace("_scored", "_ids")]
    return values[: whole_images(ids, room)]


def mismatched_lengths(
    lengths: ExampleLengths, pairs: Sequence[tuple[int, int]], max_length: int
) -> ExampleLengths:
    """Lengths of mismatched examples, in the order of the `partners`, as if every token were scored."""
    own, foreign = (lengths.take(list(side)) for side in zip(*pairs))
    room_S = max_length - np.repeat(own.prompt_P, foreign.counts_P)
    answers_S = np.minimum(foreign.answers_S, room_S)
    return ExampleLengths(foreign.kind, own.prompt_P, answers_S, foreign.counts_P)
