"""What pydantic lets through: true as the number 1, integers of hundred digits, text that no file takes."""

from __future__ import annotations

import math
import types
from collections.abc import Iterator
from datetime import date
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from dpo_fast.data.values import LARGEST as MOST
from dpo_fast.errors import UserError
from dpo_fast.training.config_file import PATHS
from dpo_fast.wording import HIDDEN, quoted

LARGEST = 2**53  # of an integer; what counts, and seeds, are far below
LONGEST = 100_000  # characters of a text, which is a name or a marker
# Bytes that common systems take. The rest of a path is for what is written below it.
LONGEST_NAME, LONGEST_PATH = 240, 3800
DEEPEST = 50


def check_types(tree: Any, model: type[BaseModel], where: str) -> None:
    """Raises UserError for a value that could only be taken for another one.

    where: what an error says first, such as the configuration's name.
    """
    for place, value, hint in _walk(tree, model, "", 0):
        fault = _fault(value, hint, place)
        if fault:
            raise UserError(f"{where}: {place}{fault}")


def _walk(value: Any, hint: Any, place: str, depth: int) -> Iterator[tuple[str, Any, Any]]:
    """Every value of a tree, with its place and the type that is wanted there if that is known."""
    if depth > DEEPEST:
        yield place, None, _TooDeep
        return
    if isinstance(value, dict):
        fields = _fields(hint)
        for name, each in value.items():
            yield f"{place}.{quoted(name)}" if place else quoted(name), name, None
            inner = fields[name].annotation if name in fields else _item(hint)
            yield from _walk(each, inner, f"{place}.{name}" if place else str(name), depth + 1)
    elif isinstance(value, (list, tuple)):
        for index, each in enumerate(value):
            yield from _walk(each, _item(hint), f"{place}.{index}", depth + 1)
    else:
        yield place, value, hint


class _TooDeep:
    """Marks a place below which nothing is read."""


def _options(hint: Any) -> tuple:
    """The types that a hint allows."""
    if get_origin(hint) is Annotated:
        return _options(get_args(hint)[0])
    if get_origin(hint) in (Union, types.UnionType):
        return tuple(each for part in get_args(hint) for each in _options(part))
    return (hint,)


def _fields(hint: Any) -> dict[str, Any]:
    found = (each for each in _options(hint) if hasattr(each, "model_fields"))
    return next((each.model_fields for each in found), {})


def _item(hint: Any) -> Any:
    """The type of the items of a list, or of the values of a mapping."""
    items = [get_args(each)[-1] for each in _options(hint) if get_args(each)]
    found = [each for each, whole in zip(items, _containers(hint)) if whole]
    return found[0] if found else None


def _containers(hint: Any) -> list[bool]:
    kinds = [get_origin(each) for each in _options(hint) if get_args(each)]
    return [kind in (list, dict, tuple) for kind in kinds]


def _fault(value: Any, hint: Any, place: str) -> str | None:
    """What is wrong with a single value, to be put behind its place."""
    if hint is _TooDeep:
        return f" is nested deeper than {DEEPEST} levels"
    if isinstance(value, str):
        return _text_fault(value, place)
    if not isinstance(value, (int, float, type(None), date, BaseModel)):
        kind = f"{type(value).__module__.partition('.')[0]}.{type(value).__name__}"
        remedy = (
            "; save a data set with save_to_disk and name the folder" if "data" in place else ""
        )
        return f" is a {kind}; a configuration holds text, numbers, lists and sections{remedy}"
    return _number_fault(value, set(_options(hint)))


def _number_fault(value: Any, options: set) -> str | None:
    literals = [type(each) for part in options for each in _literals(part)]
    numbers, flags = {int, float} & {*options, *literals}, bool in {*options, *literals}
    if isinstance(value, bool):
        shown = str(value).lower()
        return f"={shown}: expected a number" if numbers and not flags else None
    if isinstance(value, (int, float)):
        if flags and not numbers:
            return f"={quoted(value)}: expected true or false"
        whole = numbers == {int} or isinstance(value, int)
        if numbers and whole and abs(value) > LARGEST:
            return f"={quoted(value)} is out of range; the largest integer is {LARGEST}"
        if MOST < abs(value) < math.inf:
            return f"={quoted(value)} is out of range; numbers go up to {MOST:g}"
    return None


def _literals(hint: Any) -> tuple:
    return get_args(hint) if get_origin(hint) is Literal else ()


def _text_fault(value: str, place: str) -> str | None:
    found = HIDDEN.search(value)
    if found and (found[0] == "\0" or "\ud800" <= found[0] <= "\udfff"):
        what = "a NUL character" if found[0] == "\0" else "half of a surrogate pair"
        return f"={quoted(value)} has {what} in it, which no name and no file can hold"
    if len(value) > LONGEST:
        return f"={quoted(value)}: a text of {len(value):,} characters; {LONGEST:,} is the most"
    if place.rstrip(".0123456789").rpartition(".")[2] in PATHS:
        longest = max(map(len, value.encode().split(b"/")))
        if longest > LONGEST_NAME or len(value.encode()) > LONGEST_PATH:
            most = f"a file's name has at most {LONGEST_NAME} bytes, a path {LONGEST_PATH}"
            return f"={quoted(value)}: {most}"
    return None
