"""The rows of samples: as JSON Lines, or as Parquet, where lists of messages and objects are JSON text."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from dpo_fast import durable
from dpo_fast.data.config import IMAGES
from dpo_fast.data.images.written import in_rows, part_of, with_parts
from dpo_fast.generation.engine import Completion
from dpo_fast.generation.prompts import Prompt

FORMATS = {"jsonl": "samples.jsonl", "parquet": "samples.parquet"}
NAMES = ("id", "prompt_id", "uuid")  # what rows call their identity
LARGEST_ID = 2**63
# Columns that Arrow would give one type for all rows.
AS_TEXT = ("tools", "chat_template_kwargs", "row", IMAGES)


def sample_row(
    prompt: Prompt, completions: list[Completion], logps: list[float | None] | None
) -> dict[str, Any]:
    """The row of a prompt. logps: sums of its completions; None if they were not scored."""
    row: dict[str, Any] = {"prompt": prompt.prompt, **prompt.optional} | _with_images(prompt)
    row["completions"] = [each.text for each in completions]
    row["finish_reasons"] = [each.finish_reason for each in completions]
    if logps is not None:
        row["logps"] = logps
    row["where"] = prompt.where
    return row | _named(prompt.row) | ({"row": prompt.row} if prompt.row else {})


def _with_images(prompt: Prompt) -> dict[str, Any]:
    """What a row has of a prompt with images: parts that bring them, or the column of a text's."""
    images = prompt.images
    if not images:
        return {}
    if prompt.is_chat:
        return {"prompt": with_parts(prompt.prompt, lambda number: part_of(images[number]))}
    return dict(zip(("prompt", IMAGES), in_rows(prompt.prompt, images)))


def _named(row: Mapping[str, Any]) -> dict[str, Any]:
    """The identity of a prompt's row, if it has one."""
    return next(({"id": row[name]} for name in NAMES if name in row), {})


def write_rows(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows, whole or not at all, by the file's suffix. Raises OSError."""
    if file.suffix == ".parquet":
        rows = list(rows)
        ids = [row["id"] for row in rows if "id" in row]
        whole = all(type(each) is int and abs(each) < LARGEST_ID for each in ids)
        table = pyarrow.Table.from_pylist([_flat(row, whole) for row in rows])
        content = io.BytesIO()
        pyarrow.parquet.write_table(table, content)
        durable.write_file(file, content.getvalue())
        return
    lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    # A lone surrogate of a row's other columns stands in no UTF-8.
    durable.write_file(file, "".join(lines).encode("utf-8", "backslashreplace"))


def _flat(row: Mapping[str, Any], whole_ids: bool) -> dict[str, Any]:
    """whole_ids: all of them are whole numbers that Arrow has; else they become text."""
    flat = dict(row)
    for name in AS_TEXT:
        if name in flat:
            flat[name] = json.dumps(flat[name], ensure_ascii=False)
    if not isinstance(row["prompt"], str):
        flat["prompt"] = json.dumps(row["prompt"], ensure_ascii=False)
    if "id" in flat and not whole_ids:
        flat["id"] = str(flat["id"])
    return flat
