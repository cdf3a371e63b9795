"""An image in token ids: one negative number for each of its tokens.

The numbers follow from what the image is. So whatever compares, counts, hashes and shares token ids tells
prompts apart whose texts are the same and whose images are not. `collate` puts the model's image token in
their place.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

import numpy as np

KEY_BYTES = 16


def image_key(digest: bytes, processing: bytes) -> bytes:
    """What an image is to a model. digest: of its bytes. processing: what is done to its pixels."""
    return hashlib.sha256(digest + processing).digest()[:KEY_BYTES]


def codes(key: bytes, tokens: int) -> list[int]:
    """The ids of an image of so many tokens, each below 0 and from -2**31 on."""
    numbers = np.frombuffer(hashlib.shake_256(key).digest(4 * tokens), dtype="<u4")
    return (-1 - (numbers >> 1).astype(np.int64)).tolist()


def count_image_tokens(ids: Iterable[int]) -> int:
    return sum(index < 0 for index in ids)


def whole_images(ids: Sequence[int], size: int) -> int:
    """How many of the first `size` ids may be kept without a part of an image at their end."""
    if size >= len(ids) or ids[size] >= 0:
        return min(size, len(ids))
    while size and ids[size - 1] < 0:
        size -= 1
    return size


def text_and_images(ids: Sequence[int]) -> Iterator[list[int] | int]:
    """Ids in runs: a list of those of text, the number of tokens for those of images."""
    for image, run in groupby(ids, lambda index: index < 0):
        run = list(run)
        yield len(run) if image else run


def text_ids(ids: Sequence[int]) -> list[int]:
    """Ids without those of images."""
    return [index for index in ids if index >= 0]


def decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of ids, with a word for what is an image."""
    return "".join(
        f"[image: {run} tokens]" if isinstance(run, int) else tokenizer.decode(run)
        for run in text_and_images(ids)
    )
