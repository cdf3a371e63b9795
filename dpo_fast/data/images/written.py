"""Images of prompts as JSON has them: in rows that `train` reads again, and in what servers are sent."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo_fast.data.images.marks import content_parts, images_in
from dpo_fast.data.images.options import told
from dpo_fast.data.messages import Messages
from dpo_fast.errors import UserError

Stored = Mapping[
    str, Any
]  # an image as `keep_images` leaves it: `path` or `content`, and `options`


def with_parts(messages: Messages, part: Callable[[int], dict[str, Any]]) -> Messages:
    """Messages whose images are parts of their contents. part: of the image with a number."""
    return [
        {**each, "content": content_parts(each["content"], part)}
        if images_in(each["content"])
        else each
        for each in messages
    ]


def part_of(image: Stored) -> dict[str, Any]:
    """The part of a message that brings an image: its path, or itself."""
    return {"type": "image", "image": _address(image), **told(image.get("options"))}


def entry_of(image: Stored) -> dict[str, Any]:
    """The same as an object of the column `images`."""
    return {"image": _address(image), **told(image.get("options"))}


def url_part(image: Stored) -> dict[str, Any]:
    """The part that servers with the OpenAI API take."""
    return {"type": "image_url", "image_url": {"url": data_uri(content_of(image))}}


def content_of(image: Stored) -> bytes:
    """Raises UserError for a file that is not there any more."""
    if image.get("content") is not None:
        return image["content"]
    try:
        return Path(image["path"]).read_bytes()
    except OSError as error:
        raise UserError(
            f"{image['path']}: the image was there when the prompts were read, and cannot be read now: "
            f"{error.strerror}; put it back, or leave its rows out"
        ) from None


def data_uri(content: bytes) -> str:
    """The bytes of an image as a URI, with their kind."""
    from PIL import Image

    with Image.open(io.BytesIO(content)) as image:
        kind = Image.MIME.get(image.format, "image/png")
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def in_rows(text: str, images: Sequence[Stored]) -> tuple[str, list[dict[str, Any]]]:
    """A prompt that is text with `<image>` in the place of marks, and its column `images`.

    A text may have the model's own placeholders, and no marks.
    """
    order = images_in(text) or range(len(images))
    parts = content_parts(text, lambda _: {"text": "<image>"})
    return "".join(each["text"] for each in parts), [entry_of(images[each]) for each in order]


def _address(image: Stored) -> str:
    return image.get("path") or data_uri(image["content"])
