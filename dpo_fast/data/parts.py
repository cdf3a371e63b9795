"""Parts of the data: sources whose rows are read with the same options."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from dpo_fast.data.config import DataConfig
from dpo_fast.data.entries import READING, Entries, SourceOptions
from dpo_fast.data.files import RawRows
from dpo_fast.data.folders import Role
from dpo_fast.data.forms.merge import merged, merges
from dpo_fast.data.sources import Source, read_rows, resolve
from dpo_fast.data.verdicts import BadRows, Verdict
from dpo_fast.errors import UserError


@dataclass(frozen=True)
class Part:
    """An entry of data.train or data.eval; without mappings among them, all of its names.

    option: what the configuration calls it, such as `data.train[1]`.
    config: the data section with the entry's own options in it.
    entry: its options; None for plain names.
    """

    option: str
    config: DataConfig
    sources: tuple[Source, ...]
    entry: SourceOptions | None = None

    @property
    def name(self) -> str:
        return self.entry.path if self.entry else ", ".join(map(str, self.sources))

    @property
    def section(self) -> str:
        """Where the options of reading it stand."""
        return self.option if self.entry and self.entry.columns is not None else "data"

    @property
    def seed(self) -> int:
        own = self.entry.seed if self.entry else None
        return self.config.seed if own is None else own

    @property
    def choice(self) -> dict[str, int]:
        """What changes with the rows that are chosen; empty where all are taken."""
        rows = self.entry.rows if self.entry else None
        return {} if rows is None else {"rows": rows, "seed": self.seed}

    def read(self, bad: BadRows) -> RawRows:
        """Streams (where, row). Broken rows go to `bad`. Raises UserError."""
        return self._read_chosen(_Chosen(bad, self._chosen)) if self.choice else self._read(bad)

    def told(self, verdict: Verdict) -> Verdict:
        """A verdict that names the options of this entry where it named those of the data section."""
        if self.entry is None:
            return verdict
        options = re.compile(rf"\bdata\.(?=({'|'.join(READING)})\b)")
        words = (options.sub(f"{self.option}.", text) for text in (verdict.fault, verdict.detail))
        return type(verdict)(*words)

    def _read_chosen(self, bad: _Chosen) -> Iterator[tuple[str, dict[str, Any]]]:
        for item in self._read(bad):
            if bad.next_is_chosen():
                yield item

    def _read(self, bad: BadRows) -> RawRows:
        bad.ignored = self.config.ignore_columns
        rows = (merged(read_rows(source, bad), self.config) for source in self.sources)
        return itertools.chain.from_iterable(rows)

    def _count(self) -> int:
        """Rows, broken ones included. Of most sources no row is decoded for it."""
        limit = self.config.row_bytes
        first = next((row for _, row in self._read(BadRows("skip", limit))), {})
        if merges(first, self.config):
            bad = BadRows("skip", limit)
            return sum(1 for _ in self._read(bad)) + bad.total
        return sum(source.count(BadRows("skip", limit)) for source in self.sources)

    @cached_property
    def _chosen(self) -> np.ndarray:
        """Whether each row is taken, bool. A larger number of rows takes the same ones, and more."""
        count, rows = self._count(), self.choice["rows"]
        if rows > count:
            raise UserError(
                f"{self.option}.rows={rows}, but {self.name} has {count} rows; lower it, or remove it and "
                "set a weight: a small source is repeated with data.stopping_strategy=all_exhausted"
            )
        chosen = np.zeros(count, dtype=bool)
        chosen[np.random.default_rng(self.seed).permutation(count)[:rows]] = True
        return chosen


class _Chosen(BadRows):
    """A tally of broken rows that passes on those among the chosen, and counts the rows."""

    def __init__(self, tally: BadRows, chosen: np.ndarray) -> None:
        super().__init__("skip", tally.max_row_bytes)
        self.tally, self.chosen, self.row = tally, chosen, 0

    def next_is_chosen(self) -> bool:
        self.row += 1
        return bool(self.chosen[self.row - 1])

    def reject(self, where: str, verdict: Verdict) -> None:
        super().reject(where, verdict)
        if self.next_is_chosen():
            self.tally.reject(where, verdict)


def parts_of(config: DataConfig, role: Role) -> list[Part]:
    """The parts of data.train or data.eval, in order.

    Raises:
        UserError: a name that stands for nothing, for the same as another, or for data that is used for
            training and for evaluation.
    """
    parts = {}
    if not config.evaluates_alone:
        parts["train"] = _parts(config, "train", config.train_entries)
    if config.eval is not None:
        parts["eval"] = _parts(config, "eval", config.eval_entries)
    for each in parts.values():
        _check_once(each)
    _check_apart(parts.get("train", []), parts.get("eval", []))
    return parts.get(role, [])


def _check_once(parts: list[Part]) -> None:
    """Raises UserError for a source that is read twice in the same way."""
    seen = set()
    for part in parts:
        reading = repr(part.config.model_dump(include=set(READING)))
        for source in part.sources:
            if (source, reading) in seen:
                raise UserError(
                    f"{source} is read twice, the second time by {part.option}; name it once, with a "
                    "weight if it is to come more often"
                )
            seen.add((source, reading))


def _check_apart(train: list[Part], evaluation: list[Part]) -> None:
    """Raises UserError for a source of both."""
    known = {source for part in train for source in part.sources}
    for part in evaluation:
        for source in part.sources:
            if source in known:
                raise UserError(
                    f"{part.option} reads {source}, which is also in data.train; evaluation on training "
                    "data means nothing. Name other data, or set data.eval_rows instead"
                )


def _parts(config: DataConfig, role: Role, entries: Entries) -> list[Part]:
    if not any(isinstance(entry, SourceOptions) for entry in entries):
        return [Part(f"data.{role}", config, tuple(resolve(list(entries), role)))]
    return [_part(config, role, index, entry) for index, entry in enumerate(entries)]


def _part(config: DataConfig, role: Role, index: int, entry: str | SourceOptions) -> Part:
    option = f"data.{role}[{index}]"
    entry = SourceOptions(path=entry) if isinstance(entry, str) else entry
    try:
        sources = tuple(resolve([entry.path], role))
    except UserError as error:
        raise UserError(f"{option}.path={entry.path!r}: {error}") from None
    return Part(option, config.model_copy(update=entry.reading), sources, entry)
