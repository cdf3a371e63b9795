"""JSON text that means one thing: keys that stand twice, NaN and deep nesting are refused.

Everything that rows hold as JSON is decoded here, so that what walks through their values need not fear
for its stack.
"""

from __future__ import annotations

import json
import math
from typing import Any

from dpo_fast.wording import quoted

DEEPEST = 60  # levels; far above what chats and lists of tools have
OPENING = ("[", "{")


class Refused(ValueError):
    """JSON that is sound by its grammar, and refused."""


class NotFinite(Refused):
    """NaN or infinity. field: the outermost key that it stands under, where there is one."""

    def __init__(self, literal: str, field: str | None) -> None:
        fault = "is out of range" if any(map(str.isdigit, literal)) else "is not JSON"
        super().__init__(f"{literal} {fault}; expected a number or null")
        self.field = field


def decode(text: str) -> Any:
    """The value that the whole text is JSON of. Raises Refused, and ValueError for what is not JSON."""
    return decode_at(text, None)[0]


def decode_at(text: str, start: int | None) -> tuple[Any, int]:
    """(value, end) of the JSON value at `start`; None: of the whole text. Raises as `decode`."""
    literals: list[str] = []

    def number(written: str) -> float:
        value = float(written)
        if not math.isfinite(value):
            literals.append(quoted(written, 40).strip("'"))
        return value

    decoder = json.JSONDecoder(
        parse_constant=number, parse_float=number, object_pairs_hook=_without_twins
    )
    try:
        if start is None:
            value, end = decoder.decode(text), len(text)
        else:
            value, end = decoder.raw_decode(text, start)
    except RecursionError:
        raise ValueError(f"it is nested deeper than {DEEPEST} levels") from None
    if text.count("[", start or 0, end) + text.count("{", start or 0, end) > DEEPEST:
        _check_depth(value)
    if literals:
        raise NotFinite(literals[0], _field(value))
    return value, end


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for index, name in enumerate(names) if name in names[:index])
        raise Refused(f"the key {quoted(twice)} stands twice in an object; which value counts?")
    return found


def _check_depth(value: Any) -> None:
    """Raises Refused. Level by level, as recursion is what it is to prevent."""
    level = [value]
    for _ in range(DEEPEST + 1):
        items = (each.values() if isinstance(each, dict) else each for each in level)
        level = [each for own in items for each in own if isinstance(each, (dict, list))]
        if not level:
            return
    raise Refused(f"it is nested deeper than {DEEPEST} levels")


def _field(value: Any) -> str | None:
    """The key of an object under which something is not finite."""
    if not isinstance(value, dict):
        return None
    return next((name for name, item in value.items() if not _finite(item)), None)


def _finite(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return all(map(_finite, items))
