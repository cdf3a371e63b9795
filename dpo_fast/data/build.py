"""Builds a tokenised data set in a work folder: rows to Arrow, Arrow through `datasets.map`.

First one process reads and checks every row, so mistakes are reported in file order and before any
tokenising. Then data.workers processes tokenise the checked rows.
"""

from __future__ import annotations

import hashlib
import json
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import multiprocess  # what `datasets` starts processes with
import numpy as np
import pyarrow
import pyarrow.compute

from dpo_fast.data.children import bound_to_this_process
from dpo_fast.data.config import IMAGES
from dpo_fast.data.images.rows import keep_images
from dpo_fast.data.images.store import IMAGES_FILE, ImageStore, ImageWriter
from dpo_fast.data.kinds import Kind, OneKind
from dpo_fast.data.parts import Part
from dpo_fast.data.report import DataReport
from dpo_fast.data.rows import ROW_TYPES, Row, check_found, parse_row
from dpo_fast.data.template_file import check_template_used
from dpo_fast.data.tokenise import RowTokeniser, Tokenised
from dpo_fast.data.verdicts import BadRow, BadRows, Dropped, Verdict, bad_row_error
from dpo_fast.errors import UserError
from dpo_fast.progress import shown
from dpo_fast.wording import printable

BATCH = 1000
MANY = 20_000  # rows that take more than a few seconds
COUNTERS = (
    *("merged", "bos_added", "eos_added", "prompt_cut", "answers_cut", "left_out", "trailing"),
    *("bare", "image_tokens"),
)
CHECKED = pyarrow.schema([("where", pyarrow.string()), ("row", pyarrow.string())])
VERDICT = ("fault", "kind", "message")
IDS = datasets.List(datasets.Value("int32"))
KEPT_IMAGES = datasets.List(
    {
        "key": datasets.Value("binary"),
        "digest": datasets.Value("binary"),
        "path": datasets.Value("string"),
        "tokens": datasets.Value("int32"),
        "options": datasets.Value("string"),
    }
)
FLAGS = datasets.List(datasets.Value("bool"))
LABELS = {"label": datasets.Value("bool"), "scores": datasets.List(datasets.Value("float64"))}


def features(kind: Kind) -> datasets.Features:
    """Types of the columns after tokenising: those that are stored, and those for the report."""
    types = {
        **dict.fromkeys(("where", *VERDICT), "string"),
        **dict.fromkeys(kind.numbers, "float64"),
        **dict.fromkeys(COUNTERS, "int32"),
        "digest": "binary",
    }
    answers = dict.fromkeys(kind.ids[1:], datasets.List(IDS) if kind.many else IDS)
    answers |= dict.fromkeys(kind.scored, datasets.List(FLAGS) if kind.many else FLAGS)
    labels = {name: LABELS[name] for name in kind.stored_labels}
    values = {name: datasets.Value(dtype) for name, dtype in types.items()}
    ids = {"prompt_ids": IDS, IMAGES: KEPT_IMAGES}
    return datasets.Features(values | labels | ids | answers)


def build(
    part: Part, tokenizer: Any, eos_ids: list[int], work: Path
) -> tuple[datasets.Dataset, DataReport]:
    """The examples of a part, and the report on them without lengths. Raises UserError.

    The data set is memory-mapped from files in `work`. Its columns are where, the token ids, the
    stored label column, digest, and the float columns and the images that the data has.
    """
    config = part.config
    tokeniser = RowTokeniser(tokenizer, config, eos_ids, ImageStore([work / IMAGES_FILE]))
    bad = BadRows(config.on_bad_row, config.row_bytes)
    report = DataReport(list(map(str, part.sources)), bad=bad)
    checked, kind = _check_rows(part, report, work / "checked.arrow")
    tokenise = partial(
        _tokenise_batch, tokeniser=tokeniser, kind=kind, told=part.told, bad=config.on_bad_row
    )
    options = {
        "batched": True,
        "batch_size": BATCH,
        "remove_columns": CHECKED.names,
        "features": features(kind),
        "cache_file_name": str(work / "tokenised.arrow"),
        "new_fingerprint": "tokenised",  # hashing the tokenizer again would only cost time
        "desc": f"tokenising {kind.name}",
    }
    if config.workers > 1:
        tokenised = _tokenise_in_processes(checked, tokenise, config.workers, options)
    else:
        with shown(options["desc"], len(checked)) as advance:
            tokenised = checked.map(partial(_advancing, tokenise, advance), **options)
    kept = _count(tokenised, report, kind)
    if not len(kept):
        raise nothing_left(report)
    table = tokenised.select_columns(_stored_columns(tokenised, kept, kind))
    return (table if len(kept) == len(table) else table.select(kept)), report


def _advancing(tokenise: Callable, advance: Callable[[int], None], batch: dict) -> dict:
    advance(len(batch["where"]))
    return tokenise(batch)


def _tokenise_in_processes(
    checked: datasets.Dataset, tokenise: Callable, workers: int, options: dict
) -> datasets.Dataset:
    """`datasets` alone hears of the processes, so its own bar shows how far they are."""
    check_shared_memory(workers)
    silent = datasets.are_progress_bars_disabled()
    if silent and sys.stderr.isatty():
        datasets.enable_progress_bars()
    elif len(checked) > MANY:
        print(f"{options['desc']}: {len(checked):,} in {workers} processes", file=sys.stderr)
    try:
        with bound_to_this_process():
            return checked.map(tokenise, num_proc=workers, **options)
    finally:
        if silent:
            datasets.disable_progress_bars()


def check_shared_memory(workers: int) -> None:
    """Raises UserError if processes cannot share a lock. Containers without /dev/shm have none."""
    try:
        multiprocess.Lock()
    except OSError as error:
        raise UserError(
            f"data.workers={workers} needs shared memory (/dev/shm), and there is none: "
            f"{error.strerror}. Set data.workers=1, or start the container with one (docker: --shm-size)"
        ) from None


def _check_rows(part: Part, report: DataReport, path: Path) -> tuple[datasets.Dataset, Kind]:
    """The checked rows, as JSON text streamed into an Arrow file, and their kind."""
    seen = OneKind()
    with (
        pyarrow.OSFile(str(path), "wb") as file,
        pyarrow.ipc.new_stream(file, CHECKED) as writer,
        ImageWriter(path.with_name(IMAGES_FILE)) as images,
    ):
        batch: list[dict[str, str]] = []
        for row in _checked_rows(part, report, seen, images):
            batch.append(row)
            if len(batch) == BATCH:
                writer.write_batch(pyarrow.RecordBatch.from_pylist(batch, schema=CHECKED))
                batch = []
        writer.write_batch(pyarrow.RecordBatch.from_pylist(batch, schema=CHECKED))
    if seen.kind is None:
        raise nothing_left(report)
    report.chats = seen.chats
    if part.entry is None:
        check_template_used(part.config, seen.chats)
    return datasets.Dataset.from_file(str(path)), seen.kind


def _checked_rows(
    part: Part, report: DataReport, seen: OneKind, images: ImageWriter
) -> Iterator[dict[str, str]]:
    config, bad, checked, unused = part.config, report.bad, 0, set()
    absent = set(config.columns.values())
    with shown("reading rows", None) as advance:
        for where, raw in part.read(bad):
            advance(1)
            absent.difference_update(raw)
            try:
                row = parse_row(where, raw, config, unused)
                keep_images(row, config, images.keep)
                text = _to_json(row)
                seen.see(where, row.kind, row.is_chat)
                yield {"where": printable(where), "row": text}
                checked += 1
            except BadRow as verdict:
                bad.reject(where, part.told(verdict))
            except Dropped as verdict:
                report.dropped.add(where, verdict.kind, str(verdict))
            read = checked + bad.total + report.dropped.total
            if config.max_rows is not None and read >= config.max_rows:
                break
    if checked:
        check_found(absent, part.section, config)
    report.rows_read = checked + bad.total + report.dropped.total
    report.ignored_columns = sorted(unused)


def _to_json(row: Row) -> str:
    """All fields but `where`, in order."""
    try:
        return json.dumps([getattr(row, field.name) for field in fields(row)[1:]])
    except TypeError as error:
        raise BadRow("a message holds what JSON cannot", str(error)) from None


def _tokenise_batch(
    batch: dict[str, list[str]],
    *,
    tokeniser: RowTokeniser,
    kind: Kind,
    told: Callable[[Verdict], Verdict],
    bad: str,
) -> dict[str, list[Any]]:
    """One output row per input row: its ids, or the verdict against it, as it is told.

    bad: data.on_bad_row.
    """
    make_row = ROW_TYPES[kind]
    columns: dict[str, list[Any]] = {name: [] for name in features(kind)}
    for where, text in zip(batch["where"], batch["row"]):
        row = make_row(where, *json.loads(text))
        try:
            outcome = _row_columns(row, tokeniser(row))
        except Dropped as verdict:
            outcome = _verdict_columns("dropped", verdict)
        except BadRow as verdict:
            if bad == "error":
                raise bad_row_error(where, told(verdict)) from None
            outcome = _verdict_columns("bad", told(verdict))
        for name, values in columns.items():
            values.append(where if name == "where" else outcome.get(name))
    return columns


def _row_columns(row: Row, tokenised: Tokenised) -> dict[str, Any]:
    return {**vars(tokenised), **values(row), "digest": _digest(tokenised, row.kind)}


def values(row: Row) -> dict[str, Any]:
    """What is kept of a row beside its ids: its numbers, and its label or scores."""
    numbers = {name: value for name, value in row.optional.items() if name in row.kind.numbers}
    return numbers | {name: getattr(row, name) for name in row.kind.stored_labels}


def _digest(tokenised: Tokenised, kind: Kind) -> bytes:
    """sha256 of the ids, and of the flags of answers that have tokens which are not scored."""
    digest = hashlib.sha256()
    for ids in (tokenised.prompt_ids, *kind.answer_ids(vars(tokenised))):
        digest.update(_bytes([len(ids), *ids]))
    for number, flags in enumerate(kind.answer_flags(vars(tokenised))):
        if flags is not None:
            digest.update(_bytes([-1, number, *flags]))
    return digest.digest()


def _bytes(numbers: list[int]) -> bytes:
    """As four bytes each, the lowest first."""
    return struct.pack(f"<{len(numbers)}i", *numbers)


def _verdict_columns(fault: str, verdict: Verdict) -> dict[str, Any]:
    return {"fault": fault, "kind": verdict.kind, "message": str(verdict)}


def _count(tokenised: datasets.Dataset, report: DataReport, kind: Kind) -> np.ndarray:
    """Counts the outcomes in `report`; returns the indices of the rows that are kept."""
    table = tokenised.data.table
    kept = table["fault"].is_null()
    refused = table.select(["where", *VERDICT]).filter(pyarrow.compute.invert(kept))
    for batch in refused.to_batches():
        for row in batch.to_pylist():
            tally = report.bad if row["fault"] == "bad" else report.dropped
            tally.add(row["where"], row["kind"], row["message"])
    counted = table.select([*COUNTERS, IMAGES, *kind.stored_labels]).filter(kept)
    report.keep(kind, {name: _values(counted[name]) for name in counted.column_names})
    return np.flatnonzero(kept.to_numpy())


def _values(column: pyarrow.ChunkedArray) -> np.ndarray | list:
    """A column of numbers as an array; one of lists as lists."""
    nested = pyarrow.types.is_list(column.type)
    return column.to_pylist() if nested else column.to_numpy()


def nothing_left(report: DataReport, name: str = "") -> UserError:
    """The error for data without a usable row, with the reasons and the first row of each.

    name: of the source; by default those of the report.
    """
    reasons = []
    for tally in (report.bad, report.dropped):
        for kind, count in tally.counts.items():
            where, message = tally.rows[kind][0]
            reasons.append(f"{count} x {kind} (first: {where}: {message})")
    rows = "none of its rows" if name else f"none of {report.rows_read} rows"
    return UserError(
        f"{name or ', '.join(report.sources)}: {rows} is usable. " + "; ".join(reasons)
    )


def _stored_columns(table: datasets.Dataset, kept: np.ndarray, kind: Kind) -> list[str]:
    """The columns worth storing. Raises UserError for one that only some rows have."""
    numbers = []
    for name in kind.numbers:
        missing = table.data.column(name).is_null().to_numpy()[kept]
        if not missing.any():
            numbers.append(name)
        elif not missing.all():
            raise UserError(
                f"{table[int(kept[missing.argmax()])]['where']}: no {name!r}, which other rows have "
                f"({missing.sum()} of {len(kept)} rows lack it); give every row a value, or none"
            )
    flags = [
        name
        for name in (*kind.scored, IMAGES)
        if table.data.column(name).null_count < len(table.data)
    ]
    return ["where", *kind.ids, *flags, *kind.stored_labels, *numbers, "digest"]
