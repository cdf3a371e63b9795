"""The images of a micro-batch: every distinct one once, and where its tokens lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from dpo_fast.data.image_batch import ImageBatch
from dpo_fast.data.images.files import open_image
from dpo_fast.data.images.model import ModelImages
from dpo_fast.data.images.store import ImageStore
from dpo_fast.data.images.tokens import codes

if TYPE_CHECKING:
    from dpo_fast.data.kinds import Kind


class ImageLoader(NamedTuple):
    """Makes pixel values of stored images, with the processor of one model."""

    model: ModelImages
    store: ImageStore

    def __call__(self, images: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """The model's arguments for images. Raises UserError."""
        pixels = [open_image(self.store.content(image), _name(image)) for image in images]
        return self.model.inputs(pixels, [image.get("options") or "" for image in images])


def _name(image: Mapping[str, Any]) -> str:
    return image.get("path") or "an image"


class Distinct:
    """The distinct images of some examples, numbered, and their tokens one image after the other."""

    def __init__(self) -> None:
        self.images: list[Mapping[str, Any]] = []
        self._first: dict[bytes, int] = {}  # the first token of each, by key
        self._tokens = 0

    def first_token(self, image: Mapping[str, Any]) -> int:
        """Where the tokens of an image begin among those of all."""
        key = image["key"]
        if key not in self._first:
            self._first[key] = self._tokens
            self._tokens += image["tokens"]
            self.images.append(image)
        return self._first[key]


def numbered(example: Mapping, kind: Kind, distinct: Distinct) -> Mapping:
    """An example whose image tokens are -1 - t, t the token's place among those of distinct images."""
    if not example.get("images"):
        return example
    known = {}
    for image in example["images"]:
        own = codes(image["key"], image["tokens"])
        known[own[0]] = own, image
    found = dict(example)
    for name in kind.ids:
        many = kind.many and name != "prompt_ids"
        number = lambda ids: _numbered(ids, known, distinct)  # noqa: E731
        found[name] = list(map(number, example[name])) if many else number(example[name])
    return found


def _numbered(ids: Sequence[int], known: Mapping[int, tuple], distinct: Distinct) -> list[int]:
    """Raises ValueError for image tokens that are no whole image of the example."""
    ids, place = list(ids), 0
    places = [place for place, index in enumerate(ids) if index < 0]
    while place < len(places):
        own, image = known.get(ids[places[place]], ((), None))
        here = places[place : place + len(own)]
        if not own or [ids[each] for each in here] != own:
            raise ValueError("image tokens that are no whole image of the example")
        first = distinct.first_token(image)
        for offset, each in enumerate(here):
            ids[each] = -1 - (first + offset)
        place += len(own)
    return ids


def lay_images(
    input_ids: Tensor, distinct: Distinct, load: ImageLoader | None
) -> tuple[Tensor, ImageBatch | None]:
    """The input with image tokens in place of numbers below 0, and its images.

    Raises:
        UserError: an image that cannot be read any more.
        ValueError: there are images, and nothing to load them.
    """
    if not distinct.images:
        return input_ids, None
    if load is None:
        raise ValueError("examples have images, and collate has no loader for them")
    token = load.model.token_id
    numbers_N = input_ids.reshape(-1)
    image_tokens_N = numbers_N < 0
    places = -1 - numbers_N[image_tokens_N]
    tokens_D = torch.tensor([each["tokens"] for each in distinct.images], dtype=torch.int64)
    firsts_D = tokens_D.cumsum(0) - tokens_D
    begins = torch.isin(places, firsts_D)
    images = ImageBatch(
        inputs=load(distinct.images),
        tokens_D=tokens_D,
        order_I=torch.searchsorted(firsts_D, places[begins]),
        image_tokens_N=image_tokens_N,
        token_id=token,
    )
    return input_ids.masked_fill(input_ids < 0, token), images
