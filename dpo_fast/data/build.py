"""Builds a tokenised data set in a work folder: rows to Arrow, Arrow through `datasets.map`.

First every row is read and checked, one by one, in one process: a mistake is reported in file
order and before any tokenising. Then the checked rows are tokenised, in data.workers processes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow

from dpo_fast.data.config import NUMBER_COLUMNS, DataConfig
from dpo_fast.data.report import DataReport
from dpo_fast.data.rows import PairRow, ignored_columns, parse_row
from dpo_fast.data.sources import Source, read_rows
from dpo_fast.data.tokenise import PairTokeniser, TokenisedPair
from dpo_fast.data.verdicts import BadRow, BadRows, Dropped, Verdict, bad_row_error
from dpo_fast.errors import UserError

BATCH = 1000
IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
COUNTERS = ("merged", "bos_added", "eos_added", "prompt_cut", "answers_cut")
CHECKED = pyarrow.schema([("where", pyarrow.string()), ("row", pyarrow.string())])
STORED = {
    "where": datasets.Value("string"),
    **{name: datasets.List(datasets.Value("int32")) for name in IDS},
    **{name: datasets.Value("float64") for name in NUMBER_COLUMNS},
    "digest": datasets.Value("binary"),
}
VERDICT = {name: datasets.Value("string") for name in ("fault", "kind", "message")}
TOKENISED = datasets.Features(
    {**STORED, **VERDICT, **{name: datasets.Value("int32") for name in COUNTERS}}
)


def build(
    config: DataConfig, tokenizer: Any, sources: list[Source], eos_ids: list[int], work: Path
) -> tuple[datasets.Dataset, DataReport]:
    """The kept pairs and the report on them, without lengths. Raises UserError.

    The data set is memory-mapped from files in `work` and has the columns of STORED, less the
    float columns that no row has.
    """
    tokeniser = PairTokeniser(tokenizer, config, eos_ids)
    report = DataReport([str(source) for source in sources], bad=BadRows(config.on_bad_row))
    checked = _check_rows(config, sources, report, work / "checked.arrow")
    tokenised = checked.map(
        partial(_tokenise_batch, tokeniser=tokeniser, on_bad_row=config.on_bad_row),
        batched=True,
        batch_size=BATCH,
        remove_columns=CHECKED.names,
        features=TOKENISED,
        num_proc=config.workers if config.workers > 1 else None,
        cache_file_name=str(work / "tokenised.arrow"),
        new_fingerprint="tokenised",  # hashing the tokenizer again would only cost time
        desc="Tokenising pairs",
    )
    kept = _count(tokenised, report)
    if not kept:
        raise nothing_left(report)
    table = tokenised.select(kept)
    return table.select_columns(_stored_columns(table)), report


def _check_rows(
    config: DataConfig, sources: list[Source], report: DataReport, path: Path
) -> datasets.Dataset:
    """Streams the checked rows, as JSON text, into an Arrow file."""
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, CHECKED) as writer:
        batch: list[dict[str, str]] = []
        for row in _checked_rows(config, sources, report):
            batch.append(row)
            if len(batch) == BATCH:
                writer.write_batch(pyarrow.RecordBatch.from_pylist(batch, schema=CHECKED))
                batch = []
        writer.write_batch(pyarrow.RecordBatch.from_pylist(batch, schema=CHECKED))
    if not report.rows_read - report.bad.total:
        raise nothing_left(report)
    return datasets.Dataset.from_file(str(path))


def _checked_rows(
    config: DataConfig, sources: list[Source], report: DataReport
) -> Iterator[dict[str, str]]:
    bad, good, ignored = report.bad, 0, set()
    raw_rows = (item for source in sources for item in read_rows(source, bad))
    for where, raw in datasets.utils.tqdm(raw_rows, desc="Reading pairs", unit=" rows", delay=2):
        ignored |= ignored_columns(raw, config)
        try:
            yield {"where": where, "row": _to_json(parse_row(where, raw, config))}
            good += 1
        except BadRow as verdict:
            bad.reject(where, verdict)
        if config.max_rows is not None and good + bad.total >= config.max_rows:
            break
    report.rows_read = good + bad.total
    report.ignored_columns = sorted(ignored)


def _to_json(row: PairRow) -> str:
    try:
        return json.dumps([row.prompt, row.chosen, row.rejected, row.extras])
    except TypeError as error:
        raise BadRow("a message holds what JSON cannot", str(error)) from None


def _tokenise_batch(
    batch: dict[str, list[str]], *, tokeniser: PairTokeniser, on_bad_row: str
) -> dict[str, list[Any]]:
    """One output row per input row: a pair, or the verdict against it."""
    columns: dict[str, list[Any]] = {name: [] for name in TOKENISED}
    for where, text in zip(batch["where"], batch["row"]):
        row = PairRow(where, *json.loads(text))
        try:
            outcome = _pair_columns(row, tokeniser(row))
        except Dropped as verdict:
            outcome = _verdict_columns("dropped", verdict)
        except BadRow as verdict:
            if on_bad_row == "error":
                raise bad_row_error(where, verdict) from None
            outcome = _verdict_columns("bad", verdict)
        for name, values in columns.items():
            values.append(where if name == "where" else outcome.get(name))
    return columns


def _pair_columns(row: PairRow, pair: TokenisedPair) -> dict[str, Any]:
    numbers = {name: value for name, value in row.extras.items() if name in NUMBER_COLUMNS}
    return {**vars(pair), **numbers, "digest": _digest(pair)}


def _digest(pair: TokenisedPair) -> bytes:
    digest = hashlib.sha256()
    for name in IDS:
        ids = getattr(pair, name)
        digest.update(np.array([len(ids), *ids], dtype="<i4").tobytes())
    return digest.digest()


def _verdict_columns(fault: str, verdict: Verdict) -> dict[str, Any]:
    return {"fault": fault, "kind": verdict.kind, "message": str(verdict)}


def _count(tokenised: datasets.Dataset, report: DataReport) -> list[int]:
    """Adds up the outcomes in `report`; returns the indices of the pairs that are kept."""
    kept: list[int] = []
    outcomes = tokenised.select_columns(["where", *VERDICT, *COUNTERS])
    for index, row in enumerate(outcomes):
        if row["fault"]:
            tally = report.bad if row["fault"] == "bad" else report.dropped
            tally.add(row["where"], row["kind"], row["message"])
            continue
        kept.append(index)
        report.boundary_merges += row["merged"]
        report.bos_added += row["bos_added"]
        report.eos_added += row["eos_added"]
        report.prompts_cut += row["prompt_cut"] > 0
        report.answers_cut += row["answers_cut"]
    report.pairs_kept = len(kept)
    return kept


def nothing_left(report: DataReport) -> UserError:
    reasons = []
    for tally in (report.bad, report.dropped):
        for kind, count in tally.counts.items():
            where, message = tally.rows[kind][0]
            reasons.append(f"{count} x {kind} (first: {where}: {message})")
    return UserError(
        f"{', '.join(report.sources)}: none of {report.rows_read} rows is a usable pair. "
        + "; ".join(reasons)
    )


def _stored_columns(table: datasets.Dataset) -> list[str]:
    """The columns worth storing. Raises UserError for one that only some rows have."""
    numbers = []
    for name in NUMBER_COLUMNS:
        missing = [index for index, value in enumerate(table[name]) if value is None]
        if not missing:
            numbers.append(name)
        elif len(missing) < len(table):
            raise UserError(
                f"{table[missing[0]]['where']}: no {name!r}, which other rows have ({len(missing)} "
                f"of {len(table)} rows lack it); give every row a value, or none"
            )
    return ["where", *IDS, *numbers, "digest"]
