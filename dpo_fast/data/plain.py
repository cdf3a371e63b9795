"""Nested values of tools, tool calls and template arguments, the same from every container.

Arrow gives every object the keys of all others, with null, and one number type to a column of numbers.
Whether a null was meant cannot be told from that. So nulls are left out of objects, also of those from
JSON, and whole numbers are integers. JSON text inside a column is never changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date, time
from typing import Any

from dpo_fast.data.json_text import decode
from dpo_fast.data.verdicts import BadRow

WHOLE = 2**53  # up to here a double holds every integer


def plain(value: Any) -> Any:
    """The value without nulls in its objects, whole numbers as integers and times as text."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and value.is_integer() and abs(value) <= WHOLE:
        return int(value)
    if isinstance(value, (date, time)):
        return value.isoformat()
    return value


def structure(value: Any, name: str, shape: type) -> Any:
    """A list or an object, which may be JSON text, as may be the items of a list. Raises BadRow."""
    # Arrow cannot hold free-form objects, so such columns often arrive as JSON text.
    found = from_json(value, name) if isinstance(value, str) else plain(value)
    if not isinstance(found, shape):
        expected = {list: "a list", dict: "an object"}[shape]
        raise BadRow(f"field {name!r} has the wrong type", f"expected {expected}")
    if shape is list:
        return [from_json(item, name) if isinstance(item, str) else item for item in found]
    return found


def from_json(text: str, name: str) -> Any:
    """The value of JSON text. Raises BadRow."""
    try:
        return decode(text)
    except ValueError as error:
        raise BadRow(f"field {name!r} is not JSON", str(error)) from None
