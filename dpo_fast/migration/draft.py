"""Our configuration while it is made of another trainer's, and what became of every option."""

from __future__ import annotations

import difflib
import typing
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from dpo_fast.errors import UserError
from dpo_fast.migration.option import Lost, Option, Table, plain
from dpo_fast.rounds.config import RoundsConfig
from dpo_fast.training.config import RunConfig
from dpo_fast.wording import quoted

CARRIED, NEEDLESS, LOST = "carried", "not needed", "no counterpart"
SECRET = "(its value is not shown)"


@dataclass(frozen=True)
class Fate:
    """What became of one option that was given, or of something that one of them holds.

    value: None where it has none of its own. what: one of the three words above.
    """

    name: str
    value: Any
    what: str
    why: str

    @property
    def shown(self) -> str:
        """The option with its value, if it has one."""
        return self.name if self.value is None else f"{self.name}={quoted(self.value, 60)}"


@dataclass(frozen=True)
class Entry:
    """A value of our configuration, and the comment beside it."""

    value: Any
    comment: str


class Draft:
    """Keys of our configuration by their dotted names.

    trainer: its name, for comments and messages.
    options: all that it has.
    given: those of the file, by the names that the table has. place: the file, for messages.
    ranks: processes that it is started with; None where nothing says so.
    written: names that the file has in place of those of the table, by the latter: what is shown.
    unread: options whose value is not known, and why.
    read: the option whose value was asked for last, for messages.
    rounds: whether the configuration is one of rounds (`dpo-fast iterate`).
    """

    def __init__(
        self,
        trainer: str,
        options: Table,
        given: dict[str, Any],
        place: str,
        ranks: int | None,
        written: dict[str, str] | None = None,
        unread: dict[str, str] | None = None,
    ) -> None:
        self.trainer, self.options, self.place, self.ranks = trainer, options, place, ranks
        self.given = {name: plain(value) for name, value in given.items()}
        self.written, self.unread = written or {}, unread or {}
        self.keys: dict[str, Entry] = {}
        self.rounds = False
        self.notes: list[str] = []
        self.read: str | None = None  # the option that was looked at last
        self._fates: dict[str, Fate] = {}
        self._went: dict[str, list[str]] = {}  # options, and the keys that follow from them
        for name, why in self.unread.items():
            self.lose(name, why)

    def __getitem__(self, name: str) -> Any:
        """The value of an option: the one that is given, or its default."""
        self.read = name
        return self.given[name] if name in self.given else self.options[name].default

    def get(self, name: str) -> Any:
        """The value of an option; None where this trainer has no such option."""
        return self[name] if name in self.options else None

    def has(self, *names: str) -> bool:
        """Whether one of these is given, and is not nothing."""
        return any(self.given.get(name) not in (None, "") for name in names)

    def put(self, key: str, value: Any, *names: str, comment: str = "") -> None:
        """Set a key. It stands in the file if one of the options is given, or if our default is another.

        names: of the options that the value follows from.
        """
        if type(value) in (int, float) and wants_text(key):
            value = str(value)  # a name of digits, which YAML takes for a number
        for name in names:
            self._went.setdefault(name, []).append(key)
        told = ", ".join(self._written(name) for name in names if name in self.given)
        if not told and names and value == our_default(key):
            return
        default = f"{self.trainer}'s default of {self._written(names[0])}" if names else ""
        if names and names[0] not in self.options:  # a file beside
            default = names[0]
        comment = comment or told or default
        self.keys[key] = Entry(value, comment)

    def lose(self, name: str, why: str) -> None:
        """Say that an option has no counterpart."""
        self._set(name, LOST, why)

    def spare(self, name: str, why: str) -> None:
        """Say that an option needs nothing here."""
        self._set(name, NEEDLESS, why)

    def options_of(self, key: str) -> list[str]:
        """The options that are given, and that a key follows from alone."""
        return [name for name in self.given if self._went.get(name) == [key]]

    def moved(self, key: str, other: str) -> list[str]:
        """Say that what led to a key leads to another; returns the options."""
        names = [name for name, keys in self._went.items() if key in keys]
        for name in names:
            self._went[name] = [other if each == key else each for each in self._went[name]]
        return names

    def went(self, name: str, key: str) -> None:
        """Say that an option led to a key, beside others that say more of it."""
        self._went.setdefault(name, []).append(key)

    def note(self, text: str) -> None:
        """Say something about the whole."""
        if text not in self.notes:
            self.notes.append(text)

    def fault(self, name: str, why: str) -> UserError:
        """An error about an option that is given."""
        value = SECRET if self._secret(name) else quoted(self[name])
        return UserError(f"{self.place}: {self._written(name)}={value}: {why}")

    def missing(self, what: str, name: str) -> UserError:
        """An error about something that a run needs, and that the file does not name."""
        if name in self.unread:
            return UserError(f"{self.place}: {self._written(name)} {self.unread[name]}")
        return UserError(f"{self.place} names no {what}: add {self._written(name)}")

    def read_table(self) -> None:
        """Do what the table says of every option by itself."""
        for name, value in self.given.items():
            option = self.options.get(name)
            if option is None:
                self._unknown(name)
            elif option.loses(value):
                self.lose(name, option.note)
            elif not option.here:
                self.spare(name, option.note if not option.lost else "at its default")
        for name, option in self.options.items():
            read = option.here and not option.joint and not option.lost
            if read and (name in self.given or not option.older):
                self._carry(name, option)

    @property
    def fates(self) -> list[Fate]:
        """What became of every option that is given, in its order in the file."""
        found = {name: self._fates.get(name) or self._carried(name) for name in self.given}
        return list((found | self._fates).values())

    def tree(self) -> dict[str, Any]:
        """The configuration as nested mappings."""
        tree: dict[str, Any] = {}
        for key, entry in self.keys.items():
            *sections, last = key.split(".")
            place = tree
            for section in sections:
                place = place.setdefault(section, {})
            place[last] = entry.value
        return tree

    def _carry(self, name: str, option: Option) -> None:
        value = self[name]
        try:
            value = option.convert(value) if option.convert and value is not None else value
        except Lost as error:
            if name in self.given:
                self.lose(name, str(error))
            return
        except (ValueError, TypeError):
            raise self.fault(name, "not a value of this option") from None
        if value is not None:
            self.put(option.here, value, name)
        elif name in self.given:
            self.spare(name, "nothing is set")

    def _carried(self, name: str) -> Fate:
        if name in self._went:
            return self._fate(name, CARRIED, ", ".join(self._went[name]))
        return self._fate(name, NEEDLESS, "it has no effect beside the other options")

    def _unknown(self, name: str) -> None:
        near = difflib.get_close_matches(name, self.options, 1, 0.8)
        hint = f"; did you mean {near[0]}?" if near else ""
        self.lose(name, f"{self.trainer} has no such option that the import knows{hint}")

    def _set(self, name: str, what: str, why: str) -> None:
        self._fates[name] = self._fate(name, what, why)

    def _fate(self, name: str, what: str, why: str) -> Fate:
        value = None if name in self.unread else self._shown(name)
        return Fate(self._written(name), value, what, why)

    def _written(self, name: str) -> str:
        """An option by the name that the file has."""
        return self.written.get(name, name)

    def _shown(self, name: str) -> Any:
        return SECRET if self._secret(name) else self.given.get(name, self._default(name))

    def _default(self, name: str) -> Any:
        return self.options[name].default if name in self.options else None

    def _secret(self, name: str) -> bool:
        known = self.options.get(name)
        words = set(name.lower().replace(".", "_").split("_"))
        by_name = words & {"token", "secret", "password"} or {"api", "key"} <= words
        of_text = words & {"eos", "pad", "bos", "unk"}  # a token of a tokenizer is no secret
        return known is not None and known.secret or bool(by_name and not of_text)


def our_default(key: str) -> Any:
    """The default of one of our keys, such as `train.seed`. Raises KeyError for one that we do not have."""
    default = _field(key).get_default(call_default_factory=True)
    return None if default is PydanticUndefined else default


def wants_text(key: str) -> bool:
    """Whether one of our keys takes text alone."""
    kind = _field(key).annotation
    return {each for each in (typing.get_args(kind) or (kind,)) if each is not type(None)} == {str}


def place(key: str) -> tuple[bool, list[int]]:
    """Where one of our keys stands in its section; sections within a section come last."""
    model = _root(key)
    indices = []
    for name in key.split("."):
        indices.append(list(model.model_fields).index(name))
        model = _section(model.model_fields[name].annotation)
    return len(indices) > 2, indices


def _field(key: str) -> Any:
    *sections, last = key.split(".")
    model = _root(key)
    for name in sections:
        model = _section(model.model_fields[name].annotation)
    return model.model_fields[last]


def _root(key: str) -> Any:
    """The configuration that a key stands in: that of a run, or of rounds."""
    return RunConfig if key.split(".")[0] in RunConfig.model_fields else RoundsConfig


def _section(annotation: Any) -> type[BaseModel] | None:
    kinds = [annotation, *typing.get_args(annotation)]
    return next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), None)
