"""An option of another trainer, and what becomes of it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

# 5e-7 without a point is text in YAML 1.1, and everything is on a command line.
SCIENTIFIC = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+")
NOTHING = ("none", "null", "")


class Lost(Exception):
    """A value has no counterpart here. The message says why, and what to do."""


@dataclass(frozen=True)
class Option:
    """One option.

    default: theirs, which is what it means to leave it out.
    here: our key, or several, where it goes; empty where it goes nowhere.
    note: what is different here, or why it goes nowhere.
    joint: it is read together with others, by the trainer's own code.
    lost: it changes what is trained and has no counterpart, unless its value is in `harmless`.
    harmless: values besides the default that lose nothing. Where there is neither, nothing is asked for by
        false or by what is empty.
    convert: their value as ours. Raises Lost.
    secret: its value is shown nowhere.
    older: of an earlier version alone.
    """

    name: str
    default: Any = None
    here: str = ""
    note: str = ""
    joint: bool = False
    lost: bool = False
    harmless: tuple = ()
    convert: Callable[[Any], Any] | None = None
    secret: bool = False
    older: bool = False

    def loses(self, value: Any) -> bool:
        """Whether something is lost when this value has no counterpart."""
        nothing = (self.default, *self.harmless)
        if nothing == (None,):
            nothing = (None, False, "", [], {})
        return self.lost and not any(_same(value, each) for each in nothing)


Table = dict[str, Option]


def table(*groups: list[Option]) -> Table:
    """Options by name. One that stands in a later group takes the place of an earlier one."""
    return {option.name: option for group in groups for option in group}


def same(name: str, default: Any, here: str, note: str = "", convert=None) -> Option:
    """An option that goes to one key."""
    return Option(name, default, here, note, convert=convert)


def joint(name: str, default: Any, here: str, note: str = "") -> Option:
    """An option that the trainer's own code reads together with others."""
    return Option(name, default, here, note, joint=True)


def needless(note: str, **defaults: Any) -> list[Option]:
    """Options that need nothing here, for one reason."""
    return [Option(name, default, note=note) for name, default in defaults.items()]


def lost(note: str, **defaults: Any) -> list[Option]:
    """Options without a counterpart, for one reason."""
    return [Option(name, default, note=note, lost=True) for name, default in defaults.items()]


def older(*options: Option) -> list[Option]:
    """Options that newer versions no longer have."""
    return [replace(option, older=True) for option in options]


def plain(value: Any) -> Any:
    """A value as YAML meant it: numbers that were taken for text are numbers, in lists and mappings too."""
    if isinstance(value, str) and SCIENTIFIC.fullmatch(value.strip()):
        return float(value)
    if isinstance(value, dict):
        return {str(name): plain(each) for name, each in value.items()}
    if isinstance(value, list):
        return [plain(each) for each in value]
    return value


def listed(value: Any) -> list:
    """One, several or none, also as text with commas."""
    if value is None:
        return []
    if isinstance(value, str):
        return [each.strip() for each in value.split(",") if each.strip()]
    return list(value) if isinstance(value, (list, tuple)) else [value]


def flag(value: Any) -> bool:
    """A switch, also as text."""
    if isinstance(value, str):
        return value.strip().lower() not in ("false", "no", "0", "off", *NOTHING)
    return bool(value)


def _same(value: Any, other: Any) -> bool:
    if isinstance(value, bool) or isinstance(other, bool):
        return value is other
    return value == other or value is None and other in (None, "", [], {})
