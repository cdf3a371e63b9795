"""The images of prompts that are completed, found again by the first of their token ids."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from dpo_fast.data.images.laid import ImageLoader
from dpo_fast.data.images.model import ModelImages
from dpo_fast.data.images.store import ImageStore
from dpo_fast.data.images.tokens import codes


class KnownImages:
    """Images that were tokenised, of one model. loader: makes their pixel values."""

    def __init__(self, model: ModelImages, store: ImageStore) -> None:
        self.loader = ImageLoader(model, store)
        self._known: dict[int, Mapping[str, Any]] = {}

    def note(self, images: Iterable[Mapping[str, Any]]) -> None:
        """images: what `RowWithImages.stored` gives of them."""
        for each in images:
            self._known[codes(each["key"], 1)[0]] = each

    def among(self, ids: Sequence[int]) -> list[Mapping[str, Any]]:
        """The images in token ids, each as often as it is there, in their order."""
        found, place = [], 0
        while place < len(ids):
            image = self._known[ids[place]] if ids[place] < 0 else None
            found += [] if image is None else [image]
            place += 1 if image is None else image["tokens"]
        return found

    def as_read(self, ids: Sequence[int]) -> list[int]:
        """Token ids as the model has them: its image token in the place of images."""
        return [self.loader.model.token_id if index < 0 else index for index in ids]

    def inputs(self, rows: Iterable[Sequence[int]]) -> dict[str, Tensor]:
        """The model's arguments for all images of some rows of ids; empty without any.

        Raises UserError for an image that cannot be read any more.
        """
        images = [image for ids in rows for image in self.among(ids)]
        return self.loader(images) if images else {}
