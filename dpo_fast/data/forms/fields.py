"""What adapters take out of a row."""

from __future__ import annotations

from typing import Any

from dpo_fast.data.messages import Messages, say
from dpo_fast.data.verdicts import BadRow, Dropped

Raw = dict[str, Any]


def given(row: Raw) -> set[str]:
    """The columns that are not null; Arrow gives every row the columns of all others."""
    return {name for name, value in row.items() if value is not None}


def first(row: Raw, *names: str) -> Any:
    """Takes the first of these columns that is not null; None if there is none."""
    name = next((name for name in names if row.get(name) is not None), None)
    return None if name is None else row.pop(name)


def text(row: Raw, *names: str) -> str:
    """Takes the first of these columns, which is text; empty if there is none. Raises BadRow."""
    name = next((name for name in names if row.get(name) is not None), names[0])
    value = row.pop(name, None)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadRow(f"field {name!r} is not text", f"got {type(value).__name__}")
    return value


def entries(row: Raw, name: str, *keys: str) -> list[dict[str, Any]]:
    """Takes a list of objects, each of which has these keys. Raises BadRow."""
    items = row.pop(name)
    if not isinstance(items, list):
        raise BadRow(f"field {name!r} is not a list", f"got {type(items).__name__}")
    for index, item in enumerate(items):
        missing = [key for key in keys if not isinstance(item, dict) or item.get(key) is None]
        if missing:
            raise BadRow(f"{name}[{index}] has no {missing[0]!r}", f"got {item!r:.80}")
    return items


def number(value: Any, name: str) -> float:
    """A number, or text of one. Raises BadRow."""
    try:
        found = float(value)
    except (TypeError, ValueError):
        raise BadRow(f"field {name!r} is not a number", f"got {value!r:.80}") from None
    if found != found:
        raise BadRow(f"field {name!r} is not a number", "got nan")
    return found


def better(one: Any, other: Any, preference: float, name: str) -> Raw:
    """A pair of two answers: the first if preference is below 0. Raises Dropped for a tie."""
    if preference == 0:
        raise Dropped("a tie", f"{name} prefers neither answer")
    chosen, rejected = (one, other) if preference < 0 else (other, one)
    return {"chosen": chosen, "rejected": rejected}


def user(content: str) -> Messages:
    return [say("user", content)]
