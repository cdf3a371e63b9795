"""JSON, JSON Lines, CSV, Parquet and Arrow files as a stream of (where, row).

`where` is "path:line" for text and "path:row" for Parquet and Arrow, counted from 1. A broken row
goes to `bad`, which stops or skips. A file that cannot be read to its end always raises UserError.
"""

from __future__ import annotations

import csv
import gzip
import json
import math
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dpo_fast.data.verdicts import BadRow, BadRows
from dpo_fast.errors import UserError

RawRows = Iterator[tuple[str, dict[str, Any]]]  # (where, row)
LINES = (".jsonl", ".ndjson")
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json", ".jsonl.gz", ".ndjson.gz", ".json.gz")
DELIMITERS = {".csv": ",", ".csv.gz": ",", ".tsv": "\t", ".tsv.gz": "\t"}
SUFFIXES = (*JSON_SUFFIXES, *DELIMITERS, ".parquet", ".arrow")
FIELD_LIMIT = 2**31 - 1  # bytes of a cell; the module's own limit is 128 KiB
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Cell(str):
    """Text of a CSV file, where numbers and lists are text too."""


def suffix_of(path: Path) -> str | None:
    """The known suffix that the file's name ends with, or None."""
    return next((suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)), None)


def read_file(path: Path, bad: BadRows) -> RawRows:
    """Streams one file's rows. Raises UserError for a file it cannot read."""
    suffix = suffix_of(path)
    if suffix is None:
        raise UserError(f"{path}: unknown kind of file; expected one of {', '.join(SUFFIXES)}")
    if suffix in BATCHES:
        return _arrow_rows(path)
    if suffix in DELIMITERS:
        return _cells(path, DELIMITERS[suffix], bad)
    if suffix.startswith(LINES) or _first_byte(path) != b"[":
        return _json_lines(path, bad)
    return _json_array(path, bad)


def count_file(path: Path) -> int:
    """Rows of a file, broken ones included; without decoding them where lines or batches tell."""
    suffix = suffix_of(path)
    if suffix in BATCHES:
        return sum(batch.num_rows for batch in _batches(path))
    lines = suffix is not None and (suffix.startswith(LINES) or suffix in JSON_SUFFIXES)
    if lines and (suffix.startswith(LINES) or _first_byte(path) != b"["):
        return sum(1 for _ in _lines(path))
    bad = BadRows("skip")
    return sum(1 for _ in read_file(path, bad)) + bad.total


def _lines(path: Path, blank: bool = False) -> Iterator[tuple[int, bytes]]:
    """(number, bytes) of each line, or only of those that are not blank."""
    number = 0
    opener = gzip.open if path.name.lower().endswith(".gz") else open
    try:
        with opener(path, "rb") as file:
            # Splitting bytes, not text: str.splitlines would also break at U+2028 inside a string.
            for number, line in enumerate(file, 1):
                if number == 1:
                    line = line.removeprefix(BYTE_ORDER_MARK)
                if blank or line.strip():
                    yield number, line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(
            f"{path}:{number + 1}: the gzip file is damaged or cut short ({error}); copy it again"
        ) from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error


def _first_byte(path: Path) -> bytes:
    return next((line.lstrip()[:1] for _, line in _lines(path)), b"")


def _json_lines(path: Path, bad: BadRows) -> RawRows:
    for number, line in _lines(path):
        where = f"{path}:{number}"
        try:
            row = _parse_line(line)
        except BadRow as verdict:
            bad.reject(where, verdict)
        else:
            yield where, row


def _parse_line(line: bytes) -> dict[str, Any]:
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise BadRow("bad UTF-8", f"byte {error.start + 1} of the line: {error.reason}") from None
    try:
        value, constants = _decode(text, 0)[::2]
    except json.JSONDecodeError as error:
        detail = f"{error.msg} at column {error.colno}; expected one JSON object per line"
        raise BadRow("broken JSON", detail) from None
    except (ValueError, RecursionError) as error:
        raise BadRow("broken JSON", str(error)) from None
    return _as_row(value, constants)


def _decode(text: str, start: int) -> tuple[Any, int, list[str]]:
    """(value, end, NaN and infinity literals) of the JSON value at `start`.

    At 0 it must be the whole text. Raises JSONDecodeError, ValueError, RecursionError.
    """
    constants: list[str] = []

    def remember(literal: str) -> float:
        constants.append(literal)
        return float(literal)

    decoder = json.JSONDecoder(parse_constant=remember)
    if start == 0:
        return decoder.decode(text), len(text), constants
    value, end = decoder.raw_decode(text, start)
    return value, end, constants


def _as_row(value: Any, constants: list[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        kind = {list: "an array", str: "text", type(None): "null"}.get(type(value), "a number")
        raise BadRow("not an object", f"expected an object of fields, got {kind}")
    if constants:
        field = next(name for name, item in value.items() if _not_finite(item))
        raise BadRow(
            f"field {field!r} is not finite",
            f"{constants[0]} is not JSON; expected a number or null",
        )
    return value


def _not_finite(value: Any) -> bool:
    if isinstance(value, float):
        return not math.isfinite(value)
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(map(_not_finite, items))


def _json_array(path: Path, bad: BadRows) -> RawRows:
    """The objects of a JSON array. Unlike JSON Lines, the whole file is held in memory."""
    text = _whole_text(path)
    position = text.index("[") + 1
    line, counted, separator = 1, 0, "["
    while True:
        position = _skip_space(text, position)
        line, counted = line + text.count("\n", counted, position), position
        if text[position : position + 1] == "]" and separator == "[":
            break
        try:
            value, position, constants = _decode(text, position)
        except (ValueError, RecursionError) as error:
            raise _broken_array(path, text, position, error) from None
        where = f"{path}:{line}"
        try:
            row = _as_row(value, constants)
        except BadRow as verdict:
            bad.reject(where, verdict)
        else:
            yield where, row
        position = _skip_space(text, position)
        separator = text[position : position + 1]
        if separator == "]":
            break
        if separator != ",":
            raise _broken_array(path, text, position, "expected ',' or ']'")
        position += 1
    if _skip_space(text, position + 1) < len(text):
        raise _broken_array(path, text, position + 1, "text after the end of the array")


def _whole_text(path: Path) -> str:
    """The file's text. Blank lines are kept, so that lines can be counted."""
    chunks: list[str] = []
    last = 0
    for number, line in _lines(path):
        try:
            chunks.append("\n" * (number - last - 1) + line.decode())
        except UnicodeDecodeError as error:
            detail = f"bad UTF-8: byte {error.start + 1} of the line: {error.reason}"
            raise UserError(f"{path}:{number}: {detail}") from None
        last = number
    return "".join(chunks)


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _broken_array(path: Path, text: str, position: int, error: object) -> UserError:
    message = error
    if isinstance(error, json.JSONDecodeError):
        message, position = error.msg, error.pos
    line = 1 + text.count("\n", 0, position)
    column = position - text.rfind("\n", 0, position)
    return UserError(
        f"{path}:{line}: broken JSON: {message} at column {column}; expected an array of objects"
    )


def _cells(path: Path, delimiter: str, bad: BadRows) -> RawRows:
    """The rows of a file with a header, at their first lines. An empty cell is null."""
    csv.field_size_limit(FIELD_LIMIT)
    reader = csv.reader(_text_lines(path), delimiter=delimiter, strict=True)
    names: list[str] | None = None
    line = 0
    try:
        for values in reader:
            where, line = f"{path}:{line + 1}", reader.line_num
            if not values:
                continue  # a blank line
            if names is None:
                names = _header(path, values)
            elif len(values) != len(names):
                detail = f"got {len(values)} cells, and the header has {len(names)}"
                bad.reject(where, BadRow("wrong number of cells", detail))
            else:
                yield where, {n: Cell(value) if value else None for n, value in zip(names, values)}
    except csv.Error as error:
        raise UserError(f"{path}:{line + 1}: broken CSV: {error}") from error


def _text_lines(path: Path) -> Iterator[str]:
    for number, line in _lines(path, blank=True):
        try:
            yield line.decode()
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path}:{number}: bad UTF-8: byte {error.start + 1} of the line: {error.reason}"
            ) from None


def _header(path: Path, names: list[str]) -> list[str]:
    twice = [name for index, name in enumerate(names) if name in names[:index]]
    if twice or not all(names):
        fault = f"{twice[0]!r} twice" if twice else "a column without a name"
        raise UserError(f"{path}:1: the header has {fault}; expected names of columns")
    return names


def _arrow_rows(path: Path) -> RawRows:
    rows = (row for batch in _batches(path) for row in _rows_of(batch))
    return ((f"{path}:{number}", row) for number, row in enumerate(rows, 1))


def _rows_of(batch: Any) -> list[dict[str, Any]]:
    """The rows of a record batch, with the values of JSON text that is typed as such (`datasets.Json`)."""
    rows = batch.to_pylist(maps_as_pydicts="strict")
    decoders = {field.name: _decoder(field.type) for field in batch.schema}
    decoders = {name: decode for name, decode in decoders.items() if decode}
    return [row | {n: d(row[n]) for n, d in decoders.items()} for row in rows] if decoders else rows


def _decoder(kind: Any) -> Callable[[Any], Any] | None:
    """Takes values out of the JSON text in those of an Arrow type; None for a type without any."""
    from pyarrow import types

    if getattr(kind, "extension_name", None) == "arrow.json":
        return lambda value: None if value is None else json.loads(value)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        item = _decoder(kind.value_type)
        return item and (lambda values: values and [item(value) for value in values])
    if types.is_struct(kind):
        inner = {field.name: _decoder(field.type) for field in kind}
        inner = {name: decode for name, decode in inner.items() if decode}
        return (
            (lambda value: value and value | {n: d(value[n]) for n, d in inner.items()})
            if inner
            else None
        )
    return None


def _batches(path: Path) -> Iterator[Any]:
    """The record batches of a Parquet or Arrow file. Raises UserError where it is damaged."""
    import pyarrow

    number = 0
    try:
        for batch in BATCHES[suffix_of(path)](path):
            yield batch
            number += batch.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        kind = path.suffix.lstrip(".").capitalize()
        raise UserError(f"{path}:{number + 1}: not a readable {kind} file: {error}") from error


def _parquet_batches(path: Path):
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        yield from file.iter_batches(batch_size=1000)


def _arrow_batches(path: Path):
    import pyarrow

    with pyarrow.memory_map(str(path)) as source:
        try:
            reader = pyarrow.ipc.open_file(source)
        except pyarrow.ArrowInvalid:  # not the file format, so the stream format of `datasets`
            source.seek(0)
            yield from pyarrow.ipc.open_stream(source)
        else:
            yield from (reader.get_batch(index) for index in range(reader.num_record_batches))


BATCHES = {".parquet": _parquet_batches, ".arrow": _arrow_batches}
