"""Rows in memory as a file that `data.train` reads.

A table that Arrow can hold is Parquet. Everything else is a line of JSON for each row, where an image is
its path or a data URI: so a content may be a text in one message and a list of parts in the next.
"""

from __future__ import annotations

import decimal
import json
import os
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from dpo_fast import durable
from dpo_fast.api.inputs import stage
from dpo_fast.errors import UserError

if TYPE_CHECKING:
    import pandas
    from datasets import Dataset, IterableDataset

    class _ByPlace(Protocol):
        def __len__(self) -> int: ...
        def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...

    class _OfArrow(Protocol):
        def to_pylist(self) -> list[dict[str, Any]]: ...

    class _OfPolars(Protocol):
        def to_dicts(self) -> list[dict[str, Any]]: ...

    # A list of dicts is of the first kind, and so is a Dataset of torch.
    RowsInMemory: TypeAlias = (
        _ByPlace | Dataset | IterableDataset | pandas.DataFrame | _OfArrow | _OfPolars
    )

EVALUATED = "eval_dataset"
EXPECTED = "expected a Dataset, a DataFrame, a list of dicts, or a path"
MISSING = ("NAType", "NaTType")  # what pandas has in cells without a value


class _NoTable(Exception):
    """Arrow has no type for these rows."""


def rows_file(rows: Any, root: Path, name: str) -> Path:
    """Rows in memory as a file that `data.train` reads.

    rows: a Dataset of `datasets`, also a stream that ends, a table of pandas, polars or Arrow, a list of
        dicts, or anything with a length and rows.
    name: of the argument, for errors.

    Raises:
        UserError: it is nothing of these, or a row is none.
    """
    _check(rows, name)
    # A transform makes the rows as they are asked for; the table below it has others.
    shown = getattr(rows, "format", None)
    transformed = isinstance(shown, Mapping) and shown.get("type") == "custom"
    if hasattr(rows, "to_parquet") and not transformed:
        try:
            return stage(root, name, lambda file: _write_table(rows, file), ".parquet")
        except _NoTable:
            pass
    return stage(root, name, lambda file: _write_lines(rows, file, name), ".jsonl")


def _check(rows: Any, name: str) -> None:
    """Raises UserError for what are no rows, as far as that shows without reading them."""
    kind = type(rows).__name__
    if isinstance(rows, Mapping):
        several = "run.evaluate takes several by their names; " if name == EVALUATED else ""
        raise UserError(
            f"{name} is a {kind} of {', '.join(map(str, rows))}: hand over one split, as "
            f'splits["train"]; {several}datasets.Dataset.from_dict makes rows of columns'
        )
    if hasattr(rows, "__len__") and hasattr(rows, "__getitem__"):
        if not len(rows):
            raise UserError(f"{name} has no rows: it is an empty {kind}")
    elif not hasattr(rows, "__iter__"):
        raise UserError(f"{name} is a {kind}: {EXPECTED}")
    elif not hasattr(rows, "to_parquet"):
        raise UserError(
            f"{name} is a {kind}, which cannot be read twice: hand over a list, as "
            "list(itertools.islice(rows, 10000)) makes one, or name a file, which "
            "data.streaming=true reads in parts"
        )


def _write_table(rows: Any, file: Path) -> None:
    kept = {} if hasattr(rows, "column_names") else {"index": False}  # of a DataFrame
    try:
        rows.to_parquet(str(file), **kept)
    except (ValueError, TypeError, NotImplementedError):  # pyarrow's are among them
        raise _NoTable from None


def _write_lines(rows: Any, file: Path, name: str) -> None:
    with file.open("wb") as stream:
        for index, row in enumerate(_each(rows)):
            if not isinstance(row, Mapping):
                kind = type(row).__name__
                raise UserError(f"{name}[{index}] is a {kind}: expected a dict")
            stream.write(_line(row, f"{name}[{index}]"))


def _each(rows: Any) -> Iterable[Any]:
    """The rows of anything that has some, one after another."""
    if hasattr(rows, "to_pylist"):  # a table of Arrow
        return rows.to_pylist()
    if hasattr(rows, "to_dicts"):  # of polars
        return rows.to_dicts()
    if hasattr(rows, "iterrows"):  # of pandas, which writes NaN for what is not there
        return rows.astype(object).where(rows.notna(), None).to_dict("records")
    if hasattr(rows, "__len__"):
        return (rows[index] for index in range(len(rows)))
    return rows


def _line(row: Mapping, where: str) -> bytes:
    """A row as a line of JSON. Raises UserError naming the row and the field."""
    fields = []
    for key, value in row.items():
        try:
            field = json.dumps({key: value}, default=_plain, ensure_ascii=False)[1:-1]
            fields.append(field.encode())
        except (TypeError, ValueError, RecursionError, OSError) as error:
            raise UserError(f"{where}, field {key!r}: {durable.first_line(error)}") from None
    return b"{" + b", ".join(fields) + b"}\n"


def _plain(value: Any) -> Any:
    """What JSON has no word for: images, paths, times, and numbers and arrays of NumPy's or torch's."""
    kind = type(value).__name__
    if hasattr(value, "getbands"):  # of Pillow
        return _image(value)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return _data_uri(bytes(value), kind)
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if kind in MISSING:
        return None
    if hasattr(value, "isoformat"):
        return value.isoformat()
    if isinstance(value, decimal.Decimal):
        return float(value)
    if isinstance(value, uuid.UUID):
        return str(value)
    raise TypeError(f"a {kind} is neither text, number, list nor dict")


def _image(image: Any) -> str:
    """The path of an image whose file was opened and not read yet; otherwise the image itself."""
    from dpo_fast.data.images.files import png

    if getattr(image, "filename", "") and getattr(image, "tile", None):
        return os.path.abspath(image.filename)
    return _data_uri(png(image), "image")


def _data_uri(content: bytes, kind: str) -> str:
    from dpo_fast.data.images.written import data_uri

    try:
        return data_uri(content)
    except OSError:  # Pillow's for what it does not know
        raise TypeError(f"a {kind} that is no image") from None
