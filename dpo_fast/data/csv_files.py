"""CSV and TSV as a stream of (where, row). All cells are text."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from dpo_fast.data.json_files import RawRows
from dpo_fast.data.lines import read_lines, too_long
from dpo_fast.data.verdicts import BadRow, BadRows
from dpo_fast.errors import UserError
from dpo_fast.wording import quoted

INDEX = "Unnamed: 0"  # what pandas and `datasets` call the index that pandas writes without a name


class Cell(str):
    """Text of a CSV file, where numbers and lists are text too."""


def cells(path: Path, delimiter: str, bad: BadRows) -> RawRows:
    """The rows of a file with a header, at their first lines. An empty cell is null."""
    reader = csv.reader(_text_lines(path, bad.max_row_bytes), delimiter=delimiter, strict=True)
    names: list[str] | None = None
    line = 0
    try:
        while True:
            csv.field_size_limit(
                bad.max_row_bytes
            )  # the module's, so that another reader may have set it
            values = next(reader, None)
            if values is None:
                return
            where, line = f"{path}:{line + 1}", reader.line_num
            if not values:
                continue  # a blank line
            if names is None:
                names = _header(path, values)
            elif len(values) != len(names):
                detail = f"got {len(values)} cells, and the header has {len(names)}"
                bad.reject(where, BadRow("wrong number of cells", detail))
            elif sum(map(len, values)) > bad.max_row_bytes:
                bad.reject(where, too_long(bad.max_row_bytes))
            else:
                yield where, {n: Cell(value) if value else None for n, value in zip(names, values)}
    except csv.Error as error:
        raise UserError(f"{path}:{line + 1}: broken CSV: {error}") from error


def _text_lines(path: Path, limit: int) -> Iterator[str]:
    for number, line in read_lines(path, limit, blank=True):
        if line is None:
            raise UserError(f"{path}:{number}: {too_long(limit)}")
        try:
            yield line.decode()
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path}:{number}: bad UTF-8: byte {error.start + 1} of the line: {error.reason}"
            ) from None


def _header(path: Path, names: list[str]) -> list[str]:
    if len(names) > 1 and not names[0]:
        names = [INDEX, *names[1:]]
    if len(names) == 1 and (other := next((mark for mark in ";\t|" if mark in names[0]), None)):
        raise UserError(
            f"{path}:1: the header is one name, {quoted(names[0])}: cells are separated by commas, or in "
            f"a .tsv by tabs, and not by {quoted(other)}"
        )
    twice = [name for index, name in enumerate(names) if name in names[:index]]
    if twice or not all(names):
        fault = f"{quoted(twice[0])} twice" if twice else "a column without a name"
        raise UserError(f"{path}:1: the header has {fault}; expected names of columns")
    return names
