"""JSON, JSON Lines, CSV, Parquet and Arrow files as a stream of (where, row).

`where` is "path:line" for text and "path:row" for Parquet and Arrow, counted from 1. A broken row
goes to `bad`, which stops or skips. A file that cannot be read to its end always raises UserError.
"""

from __future__ import annotations

from pathlib import Path

from dpo_fast.data.arrow_files import arrow_rows, batches
from dpo_fast.data.csv_files import Cell, cells
from dpo_fast.data.json_files import RawRows, json_array, json_lines
from dpo_fast.data.lines import first_byte, read_lines
from dpo_fast.data.verdicts import BadRows
from dpo_fast.errors import UserError

__all__ = ["SUFFIXES", "Cell", "RawRows", "count_file", "read_file", "suffix_of"]
LINES = (".jsonl", ".ndjson")
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json", ".jsonl.gz", ".ndjson.gz", ".json.gz")
DELIMITERS = {".csv": ",", ".csv.gz": ",", ".tsv": "\t", ".tsv.gz": "\t"}
BATCHES = (".parquet", ".arrow")
SUFFIXES = (*JSON_SUFFIXES, *DELIMITERS, *BATCHES)


def suffix_of(path: Path) -> str | None:
    """The known suffix that the file's name ends with, or None."""
    return next((suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)), None)


def read_file(path: Path, bad: BadRows) -> RawRows:
    """Streams one file's rows. Raises UserError for a file it cannot read."""
    suffix = suffix_of(path)
    if suffix is None:
        raise UserError(f"{path}: unknown kind of file; expected one of {', '.join(SUFFIXES)}")
    if suffix in BATCHES:
        return arrow_rows(path, bad)
    if suffix in DELIMITERS:
        return cells(path, DELIMITERS[suffix], bad)
    if suffix.startswith(LINES) or first_byte(path, bad.max_row_bytes) != b"[":
        return json_lines(path, bad)
    return json_array(path, bad)


def count_file(path: Path, bad: BadRows) -> int:
    """Rows of a file, broken ones included; without decoding them where lines or batches tell.

    bad: as for `read_file`, but its own.
    """
    suffix = suffix_of(path)
    if suffix in BATCHES:
        return sum(batch.num_rows for batch in batches(path))
    lines = suffix is not None and (suffix.startswith(LINES) or suffix in JSON_SUFFIXES)
    if lines and (suffix.startswith(LINES) or first_byte(path, bad.max_row_bytes) != b"["):
        return sum(1 for _ in read_lines(path, bad.max_row_bytes))
    return sum(1 for _ in read_file(path, bad)) + bad.total
