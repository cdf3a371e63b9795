"""JSON text that means one thing: keys that stand twice, NaN and deep nesting are refused.

Everything that rows hold as JSON is decoded here, so that what walks through their values need not fear
for its stack.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from typing import Any

from dpo_fast.wording import quoted

DEEPEST = 60  # levels; far above what chats and lists of tools have
OPENING = ("[", "{")


class Refused(ValueError):
    """JSON that is sound by its grammar, and refused. value: what it says all the same."""

    def __init__(self, fault: str, value: Any = None) -> None:
        super().__init__(fault)
        self.value = value

    def without(self, names: Collection[str]) -> dict[str, Any] | None:
        """The object without these keys, where nothing else of it is refused."""
        if not names or not isinstance(self.value, dict):
            return None
        if not set(getattr(self.value, "twice", ())) <= set(names):
            return None
        kept = {name: item for name, item in self.value.items() if name not in names}
        return None if _is_deep(kept) or not _sound(kept) else kept


class NotFinite(Refused):
    """NaN or infinity. field: the outermost key that it stands under, where there is one."""

    def __init__(self, literal: str, value: Any) -> None:
        fault = "is out of range" if any(map(str.isdigit, literal)) else "is not JSON"
        super().__init__(f"{literal} {fault}; expected a number or null", value)
        self.field = _field(value)


class _Twins(dict):
    """An object in which keys stand twice. twice: these keys."""

    twice: Collection[str] = ()


def decode(text: str) -> Any:
    """The value that the whole text is JSON of. Raises Refused, and ValueError for what is not JSON."""
    return decode_at(text, None)[0]


def decode_at(text: str, start: int | None) -> tuple[Any, int]:
    """(value, end) of the JSON value at `start`; None: of the whole text. Raises as `decode`."""
    literals: list[str] = []
    twins: list[str] = []

    def number(written: str) -> float:
        value = float(written)
        if not math.isfinite(value):
            literals.append(quoted(written, 40).strip("'"))
        return value

    def an_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            found = _twins(pairs)
            twins.extend(found.twice)
        return found

    decoder = json.JSONDecoder(
        parse_constant=number, parse_float=number, object_pairs_hook=an_object
    )
    try:
        if start is None:
            value, end = decoder.decode(text), len(text)
        else:
            value, end = decoder.raw_decode(text, start)
    except RecursionError:
        raise ValueError(f"it is nested deeper than {DEEPEST} levels") from None
    if twins:
        fault = f"the key {quoted(twins[0])} stands twice in an object; which value counts?"
        raise Refused(fault, value)
    brackets = text.count("[", start or 0, end) + text.count("{", start or 0, end)
    if brackets > DEEPEST and _is_deep(value):
        raise Refused(f"it is nested deeper than {DEEPEST} levels", value)
    if literals:
        raise NotFinite(literals[0], value)
    return value, end


def _twins(pairs: list[tuple[str, Any]]) -> _Twins:
    found, names = _Twins(pairs), [name for name, _ in pairs]
    found.twice = [name for name in found if names.count(name) > 1]
    return found


def _is_deep(value: Any) -> bool:
    """Whether it has too many levels. Level by level, as recursion is what it is to prevent."""
    level = [value]
    for _ in range(DEEPEST + 1):
        items = (each.values() if isinstance(each, dict) else each for each in level)
        level = [each for own in items for each in own if isinstance(each, (dict, list))]
        if not level:
            return False
    return True


def _field(value: Any) -> str | None:
    """The key of an object under which something is not finite."""
    if not isinstance(value, dict):
        return None
    return next((name for name, item in value.items() if not _sound(item)), None)


def _sound(value: Any) -> bool:
    """Whether all numbers are finite, and no key stands twice."""
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, _Twins):
        return False
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return all(map(_sound, items))
