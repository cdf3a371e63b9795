"""Streams of sources with weights: examples are taken of each in turn, so that shares are exact."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

from dpo_fast.data.build import nothing_left
from dpo_fast.data.config import DataConfig
from dpo_fast.data.files import RawRows
from dpo_fast.data.mixture import Interleaving, shares
from dpo_fast.data.parts import Part
from dpo_fast.data.report import DataReport, SourceShare
from dpo_fast.data.stream import Chunk, ExampleStream, Forwarded
from dpo_fast.data.verdicts import BadRows


def open_stream(config: DataConfig, tokenizer: Any, eos_ids: Iterable[int] = ()) -> ExampleStream:
    """The stream of data.train at its beginning."""
    make = MixtureStream if config.weights else ExampleStream
    return make(config, tokenizer, eos_ids)


class MixtureStream(ExampleStream):
    """Sources with weights: each begins again at its own end, and every chunk is full.

    At any place of the stream the examples of each source are within one of its exact share.
    """

    def _begin(self, row: int, sources: Sequence[tuple[int, int]]) -> None:
        places = sources or [(0, 0)] * len(self.parts)
        self._turns = Interleaving(shares(self.config.weights), [taken for _, taken in places])
        self._cursors = [
            _Cursor(part, self.report.bad, row) for part, (row, _) in zip(self.parts, places)
        ]

    def read(self) -> Chunk:
        """The next chunk. Raises UserError."""
        examples, places = [], []
        sources = tuple((each.row, n) for each, n in zip(self._cursors, self._turns.taken))
        while len(examples) < self.config.stream_buffer:
            index = self._turns.next()
            where, example = self._next(index)
            examples.append(example)
            places.append(where)
        return self._chunk(examples, places, sources=sources)

    def _next(self, index: int) -> tuple[str, dict[str, Any]]:
        """The next example of a part. Raises UserError if a whole pass of it has none."""
        cursor = self._cursors[index]
        while True:
            for where, raw in cursor.rows:
                cursor.row += 1
                example = self._example(index, where, raw)
                if example is not None:
                    cursor.found = True
                    return where, example
            if not cursor.found:
                raise nothing_left(self._snapshot(), self.parts[index].name)
            cursor.begin_again()
            if all(each.passes for each in self._cursors):
                self._check_used()

    def _snapshot(self) -> DataReport:
        report = super()._snapshot()
        taken = self._turns.taken
        planned = map(float, self._turns.shares)
        names, none = (part.name for part in self.parts), [None] * len(self.parts)
        report.mixture = [SourceShare(*each) for each in zip(names, none, planned, taken)]
        return report


class _Cursor:
    """Where a source of a mixture is. passes: whole ones; found: whether this one has had an example."""

    def __init__(self, part: Part, bad: BadRows, row: int) -> None:
        self.part, self.bad, self.passes = part, bad, 0
        self.row, self.found, self.rows = row, row > 0, self._read()
        next(islice(self.rows, row, row), None)

    def begin_again(self) -> None:
        self.row, self.found, self.passes, self.rows = 0, False, self.passes + 1, self._read()

    def _read(self) -> RawRows:
        return self.part.read(Forwarded(self.bad))
