"""Options of one image, which stand beside it: the size that the processor gets it in.

    {"type": "image", "image": "a.png", "max_pixels": 50176}
    {"type": "image", "image": "a.png", "resized_height": 280, "resized_width": 420}
    {"type": "image_url", "image_url": {"url": "a.png", "detail": "high"}}
    {"images": [{"path": "a.png", "min_pixels": 3136}]}

They mean what they mean to qwen_vl_utils.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from dpo_fast.data.verdicts import BadRow

if TYPE_CHECKING:
    from PIL.Image import Image

SIZES = ("min_pixels", "max_pixels", "resized_height", "resized_width")
DETAIL = "detail"  # OpenAI's
NESTED = ("image", "image_url", "url", "source")
# In tokens, where neither an option nor data.images_kwargs says another: those of qwen_vl_utils.
LEAST, MOST = 4, 16384
RATIO = 200  # of the longer side to the shorter, the most


def stated(value: Any) -> dict[str, Any]:
    """The options that stand in a part of a message, or in the object for its image, unchecked."""
    return {
        name: each[name]
        for each in _objects(value)
        for name in (*SIZES, DETAIL)
        if each.get(name) is not None
    }


def options_of(value: Any, name: str) -> str:
    """The options of an image as JSON text; empty without any.

    value: the image as the row has it. name: of its field. Raises BadRow.
    """
    found = stated(value)
    detail = found.pop(DETAIL, "auto")
    if detail not in ("auto", "high"):  # which is what a processor does by itself
        raise BadRow(
            "an option of an image that cannot be honoured",
            f"{name}.detail={detail!r} names a size of OpenAI's models; give max_pixels, as 262144 for "
            "512 x 512, where the model's processor takes it, or leave detail out",
        )
    found = {option: _whole(each, f"{name}.{option}") for option, each in sorted(found.items())}
    sides = found.keys() & {"resized_height", "resized_width"}
    if len(sides) == 1:
        raise BadRow(
            "an option of an image that cannot be honoured",
            f"{name} has {sides.pop()} alone: give resized_height and resized_width",
        )
    least, most = found.get("min_pixels", 0), found.get("max_pixels", math.inf)
    if least > most:
        raise BadRow(
            "an option of an image that cannot be honoured",
            f"{name}.min_pixels={least} is more than max_pixels={most}",
        )
    return json.dumps(found) if found else ""


def told(options: str | None) -> dict[str, int]:
    """The options of an image by name. options: as `options_of` gives them."""
    return json.loads(options) if options else {}


def resized(image: Image, options: str, factor: int, bounds: Mapping[str, Any]) -> Image:
    """An image in the size that its options ask for, as qwen_vl_utils (`fetch_image`) has it.

    factor: pixels of the side of a token, which sides become multiples of. bounds: `min_pixels` and
    `max_pixels` where the options leave them open.

    Raises BadRow.
    """
    own = told(options)
    least = own.get("min_pixels", bounds.get("min_pixels") or LEAST * factor**2)
    most = own.get("max_pixels", bounds.get("max_pixels") or MOST * factor**2)
    width, height = image.size
    if "resized_height" in own:
        width, height = own["resized_width"], own["resized_height"]
        least, most = LEAST * factor**2, MOST * factor**2
    if max(width, height) > RATIO * min(width, height):
        raise BadRow(
            "an image that is too narrow",
            f"{width} x {height} pixels: one side may be {RATIO} times the other",
        )
    return image.resize(_fitting(width, height, factor, least, most))


def _fitting(width: int, height: int, factor: int, least: int, most: int) -> tuple[int, int]:
    """Sides that are multiples of the factor, with about that shape and no more and no fewer pixels.

    Source: `smart_resize` of qwen_vl_utils and of transformers' Qwen2VLImageProcessor.
    """
    sides = [max(factor, round(side / factor) * factor) for side in (width, height)]
    if sides[0] * sides[1] > most:
        shrink = math.sqrt(width * height / most)
        sides = [
            max(factor, math.floor(side / shrink / factor) * factor) for side in (width, height)
        ]
    elif sides[0] * sides[1] < least:
        grow = math.sqrt(least / (width * height))
        sides = [math.ceil(side * grow / factor) * factor for side in (width, height)]
    return sides[0], sides[1]


def _objects(value: Any) -> Iterator[Mapping[str, Any]]:
    """An object and those inside it that are about the same image."""
    if isinstance(value, Mapping):
        yield value
        for name in NESTED:
            yield from _objects(value.get(name))


def _whole(value: Any, name: str) -> int:
    """Arrow may have made 1024.0 of 1024."""
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0
    if not fits or value != int(value):
        raise BadRow(
            "an option of an image that cannot be honoured",
            f"{name}={value!r}: expected a whole number of pixels above 0",
        )
    return int(value)
