"""A stored reference: Parquet parts and a manifest. Complete or absent, and checked when it is read.

train/_manifest.json        what it was computed with and for, and a sha256 of every part
train/part-00000.parquet    a row for each pair: digest of its token ids, where it came from,
                            chosen_logps, rejected_logps, chosen_tokens, rejected_tokens;
                            per token also chosen_token_logps and rejected_token_logps;
                            for each completion completion_logps and so on; of groups lists,
                            completions_logps and so on

The folder reads as one table, `pandas.read_parquet(folder)`: what begins with `_` is passed over.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from dpo_fast.data.kinds import Kind
from dpo_fast.errors import UserError

FORMAT = 2
MANIFEST = "_manifest.json"
REMEDY = "delete the folder to compute it again, or name another with reference.cache_dir"


def names_of(kind: Kind, what: str) -> list[str]:
    """Columns of each answer: `logps`, sums; `tokens`, how many; `token_logps`."""
    return [f"{answer}_{what}" for answer in kind.answers]


def part_name(index: int) -> str:
    return f"part-{index:05d}.parquet"


def read_manifest(folder: Path) -> dict[str, Any]:
    """What stands in a folder's manifest. Raises UserError if there is none, or it cannot be read."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if not isinstance(manifest, dict):
            raise ValueError(f"{MANIFEST} holds no object")
    except (OSError, ValueError) as error:
        raise UserError(f"reference {folder} cannot be read ({error}); {REMEDY}") from None
    return manifest


def differences(stored: dict, wanted: dict) -> str:
    """Where a manifest differs from what is wanted of it, in words; empty if nowhere."""
    return "; ".join(
        f"{name} is {stored.get(name)!r} there and {value!r} here"
        for name, value in wanted.items()
        if stored.get(name) != value
    )


def read_rows(folder: Path, columns: list[str]) -> pyarrow.Table:
    """These columns of all parts, in order. What is decoded are the very bytes that were checked.

    Raises:
        UserError: a part is missing, or is not what was written.
    """
    parts = read_manifest(folder).get("parts")
    if not parts:
        raise UserError(f"reference {folder} cannot be read ({MANIFEST} names no parts); {REMEDY}")
    tables = []
    for name, digest in parts.items():
        try:
            content = (folder / name).read_bytes()
        except OSError as error:
            raise UserError(f"reference {folder} cannot be read ({error}); {REMEDY}") from None
        if hashlib.sha256(content).hexdigest() != digest:
            raise UserError(f"reference {folder} is damaged: {name} changed; {REMEDY}")
        tables.append(pyarrow.parquet.read_table(io.BytesIO(content), columns=columns))
    return pyarrow.concat_tables(tables)


def write_durably(file: Path, content: bytes) -> None:
    """Aside, flushed, renamed: after a power cut too the file is whole or absent."""
    aside = file.with_name(f".{file.name}.partial")
    with aside.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    aside.rename(file)
    flush_folder(file.parent)


def flush_folder(folder: Path) -> None:
    """Names in a folder reach the disk too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
