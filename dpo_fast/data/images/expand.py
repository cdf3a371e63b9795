"""The images of one row in its texts and token ids.

A chat template, or a mark in a text, leaves a placeholder for every image. What the processor writes there
takes its place before the text is tokenised, and the image tokens in it become the image's own ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

from dpo_fast.data.chat import ChatTemplate
from dpo_fast.data.config import DataConfig
from dpo_fast.data.continuation import PROBE, common
from dpo_fast.data.images.files import open_image
from dpo_fast.data.images.marks import BEGIN, MARK, mark, marked_in
from dpo_fast.data.images.model import Expansion, ModelImages
from dpo_fast.data.images.rows import in_memory, keep_images
from dpo_fast.data.images.store import ImageStore
from dpo_fast.data.images.tokens import codes, image_key
from dpo_fast.data.rows import Row
from dpo_fast.data.turns import Text, Turn, until_assistant
from dpo_fast.data.verdicts import BadRow

CHECKED = 3  # rows for every number of images that are written by the processor as a whole, too


class RowImages:
    """Writes the images of rows, of one model, with one configuration."""

    def __init__(
        self, model: ModelImages, store: ImageStore, chat: ChatTemplate, config: DataConfig
    ) -> None:
        self.model, self.store, self.chat, self.config = model, store, chat, config
        self._checked: dict[int, int] = {}

    @cached_property
    def wrapped(self) -> str:
        """What the chat template writes for an image: the placeholder, most often between two tokens."""
        placeholder = self.model.placeholder
        if not self.chat.exists:
            return placeholder
        plain, whole = (
            self.chat.question(f"{begin}{PROBE}", generate=False) for begin in ("", mark(0))
        )
        start = common(plain, whole)
        found = whole[start : start + len(whole) - len(plain)]
        return found if found.count(placeholder) == 1 else placeholder

    def of(self, row: Row) -> RowWithImages:
        """The images of a row, decoded. Raises BadRow."""
        keep_images(row, self.config, in_memory)  # where that has not been done
        found = []
        for place, image in enumerate(row.optional["images"]):
            name = f"images[{place}]" + (f" ({image['path']})" if image.get("path") else "")
            pixels = open_image(self.store.content(image), name)
            expansion = self.model.expansion(pixels, image.get("options") or "", name)
            found.append(_Image(image, pixels, expansion))
        return RowWithImages(self, found)

    def check_none(self, name: str, ids: Sequence[int]) -> None:
        """Raises BadRow for the model's image token in a text of a row without images.

        The model would look for an image there, in every batch that has some.
        """
        token = self.model.told_token_id
        if token is not None and token in ids:
            raise BadRow(
                "an image token without an image",
                f"{name} has {ids.count(token)} times {self.model.tokenizer.decode([token])!r}, the "
                "model's image token, and the row has no images: give it them, or take the token out of "
                "its text",
            )

    def check(self, before: str, after: str, images: list[Any]) -> None:
        """Raises BadRow where the processor writes several images of a text in another way than one."""
        count = len(images)
        if self._checked.get(count, 0) == CHECKED:
            return
        self._checked[count] = self._checked.get(count, 0) + 1
        whole = self.model.written(before, images)
        if whole != after:
            raise BadRow(
                "the processor writes the images of this row in another way together",
                f"{type(self.model.processor).__name__}: {count} images in one text are not what they are "
                "by themselves; give rows with one image",
            )


class _Image(NamedTuple):
    stored: dict[str, Any]
    pixels: Any
    expansion: Expansion

    @property
    def options(self) -> str:
        return self.stored.get("options") or ""


class RowWithImages:
    """One row's images."""

    def __init__(self, rows: RowImages, images: list[_Image]) -> None:
        self.rows, self.images = rows, images
        self.placeholder = rows.model.placeholder

    def texts(self, row: Row, prompt: str, texts: list[Text]) -> tuple[str, list[Text]]:
        """Prompt and whole texts with what the processor writes for images. Raises BadRow."""
        self.order = self._order(row, prompt)
        self.orders = [self._answer_order(row, answer) for answer in row.answers.values()]
        before = self._with_placeholders(prompt)
        written = self._written(before, self.order, "the prompt")
        pixels = [self.images[each].pixels for each in self.order]
        # Those with options of their own go to the processor one by one.
        if pixels and not any(self.images[each].options for each in self.order):
            self.rows.check(before, written, pixels)
        found = []
        for name, order, text in zip(row.answers, self.orders, texts):
            rest = text.whole[len(prompt) :]
            begun = text.begun(written, written + rest)
            found.append(self._answer(begun, len(written), order, name))
        return written, found

    def ids(self, ids: list[int], order: Sequence[int]) -> list[int]:
        """Token ids with the images' own. order: the images in them. Raises BadRow."""
        token = self.rows.model.token_id
        own = iter([code for image in order for code in self.codes(image)])
        found = [next(own, token) if index == token else index for index in ids]
        if token in found or next(own, None) is not None:
            raise BadRow(
                "image tokens that are no image's",
                f"a text has {ids.count(token)} times the model's image token {token}, and its images have "
                f"{sum(self.images[image].expansion.tokens for image in order)} tokens",
            )
        return found

    def codes(self, image: int) -> list[int]:
        return codes(self._key(image), self.images[image].expansion.tokens)

    def stored(self, ids: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
        """What is stored of the images in these ids."""
        there = {index for each in ids for index in each if index < 0}
        found = {}
        for place, image in enumerate(self.images):
            if self.codes(place)[0] in there:
                content = {
                    k: image.stored[k]
                    for k in ("digest", "path", "content", "options")
                    if k in image.stored
                }
                digest = content["digest"]
                content["digest"] = bytes.fromhex(digest) if isinstance(digest, str) else digest
                found[self._key(place)] = content | {
                    "key": self._key(place),
                    "tokens": image.expansion.tokens,
                }
        return list(found.values())

    def _key(self, image: int) -> bytes:
        digest = self.images[image].stored["digest"]
        digest = bytes.fromhex(digest) if isinstance(digest, str) else digest
        return image_key(digest, self.rows.model.processing + self.images[image].options.encode())

    def _order(self, row: Row, prompt: str) -> list[int]:
        """The images of the prompt, in their order. A text may have the model's own placeholders."""
        order = marked_in(row.prompt)
        if order or row.is_chat:
            return order
        return list(range(prompt.count(self.placeholder)))

    def _answer_order(self, row: Row, answer: Any) -> list[int]:
        return marked_in(until_assistant(answer)) if row.is_chat else marked_in(answer)

    def _with_placeholders(self, text: str) -> str:
        """A text with placeholders in place of marks, which only texts without a template still have."""
        return MARK.sub(lambda _: self.rows.wrapped, text) if BEGIN in text else text

    def _written(self, text: str, order: Sequence[int], name: str) -> str:
        pieces = text.split(self.placeholder)
        if len(pieces) - 1 != len(order) or (order and max(order) >= len(self.images)):
            raise BadRow(
                "images and their places differ in number",
                f"{name} has {len(order)} of the row's {len(self.images)} images, and its text has "
                f"{len(pieces) - 1} times {self.placeholder!r}: the chat template writes no place for "
                "each image, or a text has one of its own",
            )
        expansions = [self.images[image].expansion.text for image in order]
        return "".join([pieces[0], *(a + b for a, b in zip(expansions, pieces[1:]))])

    def _answer(self, text: Text, start: int, order: Sequence[int], name: str) -> Text:
        """An answer's text with the images of later turns. start: where the answer begins."""
        rest = self._with_placeholders(text.whole[start:])
        written = self._written(rest, order, name)
        if not order:
            return text
        if text.scored:
            raise BadRow(
                "an image that would be scored",
                f"{name} has one in a message of the user, and data.scored=all scores such messages",
            )
        moved = list(self._moved(rest, order))

        def place(character: int) -> int:
            inner = character - start
            return character + next((gain for end, gain in reversed(moved) if end <= inner), 0)

        turns = [Turn(place(a), place(b), at) for a, b, at in text.turns]
        return replace(text, whole=text.whole[:start] + written, turns=tuple(turns))

    def _moved(self, text: str, order: Sequence[int]) -> Iterator[tuple[int, int]]:
        """After each placeholder of a text, by how many characters what follows has moved."""
        size = len(self.placeholder)
        pieces = text.split(self.placeholder)
        ends = accumulate(len(piece) + size for piece in pieces[:-1])
        gains = accumulate(len(self.images[image].expansion.text) - size for image in order)
        yield from zip(ends, gains)
