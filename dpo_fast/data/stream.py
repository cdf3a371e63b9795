"""Rows that are read, checked and tokenised while a run trains on them; nothing is stored.

A stream is cut into chunks. Each chunk is a small data set in memory, shuffled and batched like any
other. The end of a pass over the data ends a chunk early; then the data begins again. A chunk knows
the row of the pass at which it begins, so a resumed run need not tokenise the rows before it.

Sources with weights are each a stream of their own (`stream_mixture.py`).
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, ClassVar

import numpy as np
import pyarrow

from dpo_fast.data.build import nothing_left, values
from dpo_fast.data.config import IMAGES, DataConfig
from dpo_fast.data.dataset import cache_key
from dpo_fast.data.images.laid import ImageLoader
from dpo_fast.data.images.model import images_of
from dpo_fast.data.images.rows import in_memory, keep_images
from dpo_fast.data.images.store import ImageStore
from dpo_fast.data.kinds import PAIRS, ExampleLengths, Kind, OneKind
from dpo_fast.data.lists import Lists
from dpo_fast.data.parts import parts_of
from dpo_fast.data.report import DataReport
from dpo_fast.data.rows import Row, check_found, parse_row
from dpo_fast.data.template_file import check_template_used
from dpo_fast.data.tokenise import RowTokeniser
from dpo_fast.data.verdicts import BadRow, BadRows, Dropped
from dpo_fast.errors import UserError


@dataclass(frozen=True)
class Chunk:
    """Consecutive examples of a stream, with those attributes of a `Dataset` that training reads.

    number: chunks before it, over all passes.
    row: rows of the pass before it.
    sources: of sources with weights, rows of the pass and examples of each before it.
    report: counts of the stream up to its end, with the lengths of its own examples.
    images: makes pixel values; None where no example has images.
    """

    number: int
    row: int
    examples: list[dict[str, Any]]
    places: list[str]
    report: DataReport
    kind: Kind = PAIRS
    sources: tuple[tuple[int, int], ...] = ()
    images: ImageLoader | None = None
    mixture: ClassVar[None] = None

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: _as_lists(value) for name, value in self.examples[index].items()}

    def where(self, index: int) -> str:
        return self.places[index]

    def column(self, name: str, indices: range) -> pyarrow.Array:
        """The values of these examples in a column that all have."""
        return pyarrow.array([self[index][name] for index in indices])

    def token_lists(self, name: str, indices: np.ndarray) -> Lists:
        """The token ids of these examples in a column; of groups those of every answer."""
        found = [self.examples[index][name] for index in indices.tolist()]
        many = self.kind.many and name != "prompt_ids"
        return Lists.of([ids for each in found for ids in each] if many else found)

    def named(self, places: list[str]) -> dict[int, str]:
        return {index: place for index, place in enumerate(self.places) if place in places}

    @property
    def numbers(self) -> list[str]:
        """The optional float columns that the examples have."""
        return [name for name in self.kind.numbers if any(name in each for each in self.examples)]

    @cached_property
    def lengths(self) -> ExampleLengths:
        return ExampleLengths.of(self.examples, self.kind)

    @cached_property
    def labels(self) -> np.ndarray:
        return np.array([each["label"] for each in self.examples], dtype=bool)


class ExampleStream:
    """The rows of data.train, without end, in chunks of data.stream_buffer.

    tokenizer, eos_ids: as for `load_examples`; not to be used by another thread during `read`.
    """

    def __init__(self, config: DataConfig, tokenizer: Any, eos_ids: Iterable[int] = ()) -> None:
        self.config, self.tokenizer, self.eos_ids = config, tokenizer, list(eos_ids)
        self.parts = parts_of(config, "train")
        self._tokenisers = [RowTokeniser(tokenizer, part.config, eos_ids) for part in self.parts]
        self._images = ImageLoader(images_of(tokenizer, config.images_kwargs), ImageStore())
        self._seen, self._numbers = OneKind(), None
        self._absent = [set(part.config.columns.values()) for part in self.parts]
        self.seek(0, 0)

    @cached_property
    def key(self) -> str:
        """32 hex digits that change with anything that could change the rows. Reads every file."""
        keys = [cache_key(part, self.tokenizer, self.eos_ids) for part in self.parts]
        if len(keys) == 1:
            return keys[0]
        keys += [str((weight, part.seed)) for weight, part in zip(self.config.weights, self.parts)]
        return hashlib.sha256("".join(keys).encode()).hexdigest()[:32]

    def seek(self, number: int, row: int, sources: Sequence[tuple[int, int]] = ()) -> None:
        """Go to the beginning of a chunk, as it describes it. Tokenises nothing.

        The report starts anew.
        """
        names = [str(source) for part in self.parts for source in part.sources]
        bad = BadRows(self.config.on_bad_row, self.config.row_bytes)
        self.report = DataReport(names, bad=bad)
        self._number = number
        self._begin(row, sources)

    def _begin(self, row: int, sources: Sequence[tuple[int, int]]) -> None:
        self._row, self._rows = row, self._pass()
        self._whole_pass = row == 0
        next(islice(self._rows, row, row), None)

    def read(self) -> Chunk:
        """The next chunk, which is shorter at the end of a pass. Raises UserError."""
        row, examples, places = self._row, [], []
        for index, where, raw in self._rows:
            self._row += 1
            example = self._example(index, where, raw)
            if example is not None:
                examples.append(example)
                places.append(where)
            if len(examples) == self.config.stream_buffer:
                break
        else:
            if not examples and row == 0:
                raise nothing_left(self._snapshot())
            if self._whole_pass:
                self._check_used()
            self._row, self._rows, self._whole_pass = 0, self._pass(), True
            if not examples:
                return self.read()
        return self._chunk(examples, places, row)

    def _chunk(
        self, examples: list[dict], places: list[str], row: int = 0, sources: tuple = ()
    ) -> Chunk:
        self._number += 1
        report, kind = self._snapshot(), self._seen.kind
        images = self._images if any(IMAGES in each for each in examples) else None
        chunk = Chunk(self._number - 1, row, examples, places, report, kind, sources, images)
        chunk.report.measure(chunk.lengths)
        return chunk

    def _pass(self) -> Iterator[tuple[int, str, dict[str, Any]]]:
        """All rows of the data, or the first data.max_rows, once; each with the number of its part."""
        broken = Forwarded(self.report.bad)
        rows = (
            (index, *item) for index, part in enumerate(self.parts) for item in part.read(broken)
        )
        for number, item in enumerate(rows, 1):
            yield item
            if self.config.max_rows is not None and number + broken.total >= self.config.max_rows:
                break

    def _example(self, index: int, where: str, raw: dict[str, Any]) -> dict[str, Any] | None:
        """Ids as int32 arrays, and the row's numbers; None for a row that is not used.

        index: of the row's part.
        """
        part, unused = self.parts[index], set(self.report.ignored_columns)
        self._absent[index].difference_update(raw)
        try:
            row = parse_row(where, raw, part.config, unused)
            keep_images(row, part.config, in_memory)
            self._see(row)
            tokenised = self._tokenisers[index](row)
        except Dropped as verdict:
            self.report.dropped.add(where, verdict.kind, str(verdict))
        except BadRow as verdict:
            self.report.bad.reject(where, part.told(verdict))
        else:
            self.report.ignored_columns = sorted(unused)
            outcome = vars(tokenised) | values(row)
            self.report.keep(row.kind, {name: [value] for name, value in outcome.items()})
            ids = {name: _as_arrays(getattr(tokenised, name)) for name in row.kind.ids}
            flags = {name: getattr(tokenised, name) for name in row.kind.scored}
            told = {name: _as_arrays(each, np.bool_) for name, each in flags.items() if each}
            images = {IMAGES: tokenised.images} if tokenised.images else {}
            return ids | told | images | values(row)
        return None

    def _check_used(self) -> None:
        """After all rows: raises UserError for options that none of them has used."""
        check_template_used(self.config, self._seen.chats)
        for part, absent in zip(self.parts, self._absent):
            check_found(absent, part.section, part.config)

    def _see(self, row: Row) -> None:
        """Raises UserError if the row differs from those before in its kind or its numbers."""
        self._seen.see(row.where, row.kind, row.is_chat)
        numbers = {name for name in row.optional if name in row.kind.numbers}
        if self._numbers is None:
            self._numbers = numbers
        elif differing := sorted(numbers ^ self._numbers):
            has, others = ("no", "have") if differing[0] in self._numbers else ("a", "do not have")
            raise UserError(
                f"{row.where}: {has} {differing[0]!r}, which rows before it {others}; give every row a "
                "value, or none"
            )

    def _snapshot(self) -> DataReport:
        report = copy.deepcopy(self.report)
        report.rows_read = report.examples_kept + report.bad.total + report.dropped.total
        return report


def _as_arrays(ids: list, dtype: type = np.int32) -> np.ndarray | list[np.ndarray]:
    """Token ids of one text, or of several. Lists of them take eight times the memory."""
    if isinstance(ids[0], list):
        return [_as_arrays(each, dtype) for each in ids]
    return np.array(ids, dtype=dtype)


def _as_lists(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    return [_as_lists(each) for each in value] if isinstance(value, list) else value


class Forwarded(BadRows):
    """A tally of the rows that a reader refuses, which passes each of them on to another tally."""

    def __init__(self, tally: BadRows) -> None:
        super().__init__(tally.on_bad_row, tally.max_row_bytes)
        self.tally = tally

    def add(self, where: str, kind: str, message: str) -> None:
        super().add(where, kind, message)
        self.tally.add(where, kind, message)
