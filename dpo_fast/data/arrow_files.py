"""Parquet and Arrow as a stream of (where, row).

What is read is not trusted: an offset beyond its buffer ends a process without a word. So nothing is looked
at before Arrow has validated it in full, and no file is mapped into memory, which another program may cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dpo_fast.data.json_files import RawRows
from dpo_fast.data.json_text import decode
from dpo_fast.data.lines import too_long
from dpo_fast.data.verdicts import BadRow, BadRows
from dpo_fast.errors import UserError
from dpo_fast.wording import clipped

BATCH = 200  # rows of Parquet that are unpacked at a time
# What values of damaged or foreign columns raise on their way into Python.
UNREADABLE = (
    *(ValueError, OverflowError, LookupError, SystemError, TypeError, RecursionError),
    AttributeError,
)


def arrow_rows(path: Path, bad: BadRows) -> RawRows:
    """The rows of a Parquet or Arrow file."""
    number = 0
    for batch in batches(path):
        # An ignored column may be damaged, or of a type that Python has none for.
        batch = batch.select([name for name in batch.schema.names if name not in bad.ignored])
        for row in rows_of(batch, bad.max_row_bytes):
            number += 1
            where = f"{path}:{number}"
            if isinstance(row, BadRow):
                bad.reject(where, row)
            else:
                yield where, row


def rows_of(batch: Any, limit: int) -> Iterator[dict[str, Any] | BadRow]:
    """The rows of a record batch, with the values of JSON text that is typed as such (`datasets.Json`)."""
    import pyarrow

    try:
        batch.validate(full=True)
        rows = batch.to_pylist(maps_as_pydicts="strict") if batch.nbytes <= limit else None
        if rows is not None:
            yield from _decoded(rows, batch.schema)
            return
    except (pyarrow.ArrowException, *UNREADABLE):
        pass  # one by one, to tell which row it is
    for index in range(batch.num_rows):
        yield _row_or_verdict(batch.slice(index, 1), limit)


def _row_or_verdict(batch: Any, limit: int) -> dict[str, Any] | BadRow:
    """The row of a batch of one."""
    import pyarrow

    row: dict[str, Any] = {}
    for name, column in zip(batch.schema.names, batch.columns):
        try:
            column.validate(full=True)
            if column.nbytes > limit and _text_bytes(column) > limit:
                return too_long(limit)
            row[name] = _value(column)
        except (pyarrow.ArrowException, *UNREADABLE) as error:
            detail = f"it cannot be read: {clipped(str(error) or type(error).__name__)}"
            return BadRow(f"field {name!r} is damaged", detail)
    try:
        return _decoded([row], batch.schema)[0]
    except UNREADABLE as error:
        return BadRow("broken JSON", clipped(str(error)))


def _text_bytes(column: Any) -> int:
    """Bytes of a column without those of images, which are not tokenised."""
    from pyarrow import types

    kind = column.type
    if types.is_binary(kind) or types.is_large_binary(kind):
        return 0
    if types.is_struct(kind):
        return sum(map(_text_bytes, column.flatten()))
    if types.is_list(kind) or types.is_large_list(kind):
        return _text_bytes(column.flatten())
    return column.nbytes


def _value(column: Any) -> Any:
    """The value of a column of one row; a time that Python has no type for, as text."""
    import pyarrow

    try:
        return column.to_pylist(maps_as_pydicts="strict")[0]
    except UNREADABLE:
        if not pyarrow.types.is_temporal(column.type):
            raise
        return column.cast(pyarrow.string()).to_pylist()[0]


def _decoded(rows: list[dict[str, Any]], schema: Any) -> list[dict[str, Any]]:
    decoders = {field.name: _decoder(field.type) for field in schema}
    decoders = {name: decode for name, decode in decoders.items() if decode}
    return [row | {n: d(row[n]) for n, d in decoders.items()} for row in rows] if decoders else rows


def _decoder(kind: Any) -> Callable[[Any], Any] | None:
    """Takes values out of the JSON text in those of an Arrow type; None for a type without any."""
    from pyarrow import types

    if getattr(kind, "extension_name", None) == "arrow.json":
        return lambda value: None if value is None else decode(value)
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


def batches(path: Path) -> Iterator[Any]:
    """The record batches of a file, not validated. Raises UserError where it is damaged."""
    import pyarrow

    read = _parquet_batches if path.name.lower().endswith(".parquet") else _ipc_batches
    number = 0
    try:
        for batch in read(path):
            _check_names(path, batch.schema.names)
            yield batch
            number += batch.num_rows
    except (pyarrow.ArrowException, OSError, *UNREADABLE) as error:
        if isinstance(error, UserError):
            raise
        kind = path.suffix.lstrip(".").capitalize()
        reason = clipped(str(error), 500)
        raise UserError(f"{path}:{number + 1}: not a readable {kind} file: {reason}") from error


def _check_names(path: Path, names: list[str]) -> None:
    twice = [name for index, name in enumerate(names) if name in names[:index]]
    if twice:
        raise UserError(f"{path}: the column {twice[0]!r} stands twice; which of them counts?")


def _parquet_batches(path: Path) -> Iterator[Any]:
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        yield from file.iter_batches(batch_size=BATCH)


def _ipc_batches(path: Path) -> Iterator[Any]:
    import pyarrow

    with pyarrow.OSFile(str(path)) as source:
        try:
            reader = pyarrow.ipc.open_file(source)
        except pyarrow.ArrowInvalid:  # not the file format, so the stream format of `datasets`
            source.seek(0)
            yield from pyarrow.ipc.open_stream(source)
        else:
            yield from (reader.get_batch(index) for index in range(reader.num_record_batches))
