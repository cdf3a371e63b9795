"""Text that others wrote, made fit for a message: no control characters, no longer than a line or two."""

from __future__ import annotations

import re
from typing import Any

LONGEST = 200  # characters of one value in a message
# Control characters but for line break and tab; marks that turn the direction of writing, with which text
# can look like other text; lone halves of surrogate pairs, which no terminal and no file takes.
HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: str) -> str:
    """The text with what a terminal would obey, or cannot show, written out, as in \\x1b."""
    return HIDDEN.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def clipped(text: str, most: int = LONGEST) -> str:
    """The text, or its beginning and its end with what is left out between them."""
    if len(text) <= most:
        return text
    head, tail = most - most // 4, most // 4
    return f"{text[:head]} ... {len(text) - head - tail:,} characters ... {text[-tail:]}"


def quoted(value: Any, most: int = LONGEST) -> str:
    """`repr` of a value that may be long or deeply nested, for a message."""
    try:
        return clipped(printable(repr(value)), most)
    except (RecursionError, ValueError):  # an integer of more digits than Python writes
        return f"a {type(value).__name__}"
