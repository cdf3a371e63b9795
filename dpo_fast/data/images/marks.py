"""Marks: where the images of a row stand in its texts.

A mark is made of code points that Unicode never assigns, so it is no word, no white space and in no data.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from dpo_fast.data.messages import Messages
from dpo_fast.data.verdicts import BadRow

BEGIN, END, ZERO = "\ufdd0", "\ufdd1", 0xFDD2
MARK = re.compile(f"{BEGIN}([{chr(ZERO)}-{chr(ZERO + 9)}]+){END}")


def mark(image: int) -> str:
    """The mark of the row's image with this number."""
    return BEGIN + "".join(chr(ZERO + int(digit)) for digit in str(image)) + END


def images_in(text: str) -> list[int]:
    """The numbers of the images that are marked in a text, in its order."""
    if BEGIN not in text:
        return []
    return [_number(each) for each in MARK.findall(text)]


def content_parts(
    text: str, part: Callable[[int], dict[str, Any]] = lambda _: {"type": "image"}
) -> list[dict[str, Any]]:
    """A message's content as the parts that chat templates take. part: of the image with a number."""
    found: list[dict[str, Any]] = []
    for place, piece in enumerate(MARK.split(text)):
        if place % 2:
            found.append(part(_number(piece)))
        elif piece:
            found.append({"type": "text", "text": piece})
    return found


def named(told: str | Messages) -> str | Messages:
    """A text, or messages, for people and models that read texts: `[image 1]` in the place of marks."""
    if isinstance(told, str):
        return MARK.sub(lambda found: f"[image {_number(found[1]) + 1}]", told)
    return [{**message, "content": named(message["content"])} for message in told]


def marked_in(told: str | Messages) -> list[int]:
    """The numbers of the images in a text or in messages, in their order."""
    if isinstance(told, str):
        return images_in(told)
    return [image for message in told for image in images_in(message["content"])]


def check_images(prompt: str | Messages, answers: Mapping[str, str | Messages], count: int) -> None:
    """Raises BadRow for images where none may be, and for those that no text has a place for.

    count: images of the row. Texts may have the placeholders of a model in place of marks.
    """
    for name, answer in answers.items():
        said = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
        for place, message in enumerate(said):
            if message["role"] == "assistant" and images_in(message["content"]):
                raise BadRow(
                    "an image in an answer",
                    f"{name}[{place}]: models of this kind write texts alone",
                )
    used = {
        *marked_in(prompt),
        *(each for answer in answers.values() for each in marked_in(answer)),
    }
    if len(used) < count and not (isinstance(prompt, str) and not used):
        raise BadRow(
            "an image without a place",
            f"the row has {count} images, and its texts have {len(used)}",
        )


def _number(digits: str) -> int:
    return int("".join(str(ord(digit) - ZERO) for digit in digits))
