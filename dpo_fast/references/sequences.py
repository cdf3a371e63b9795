"""Log-probs of single sequences, kept beside the samples that they are of, as a Parquet file.

    digest         sha256 of the prompt's and the answer's token ids (`sequence_digest`)
    logps          summed log-prob of the answer's scored tokens, fp32
    tokens         scored tokens, int32
    token_logps    their log-probs, list of fp32

The file's metadata name the model by its identity (`models/identity.py`) and the dtype of its weights. So a
reference that is the sampler is filled from it (`fill`), for pairs, completions and groups alike, and no
sequence is scored a second time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.parquet
import torch

from dpo_fast import durable
from dpo_fast.data.dataset import Dataset
from dpo_fast.errors import UserError
from dpo_fast.references.artefact import Growing
from dpo_fast.references.blocks import blocks
from dpo_fast.references.cached import find_rows
from dpo_fast.references.compute import part_table
from dpo_fast.references.store import Place, Request, look

FORMAT = 1
KEY = b"dpo_fast"


def sequence_digest(
    prompt_ids: Sequence[int], answer_ids: Sequence[int], scored: Sequence[bool] | None = None
) -> bytes:
    """sha256 of a sequence. scored: which of the answer's tokens are; None: all."""
    digest = hashlib.sha256()
    for ids in (prompt_ids, answer_ids):
        digest.update(np.array([len(ids), *ids], dtype="<i4").tobytes())
    if scored is not None and not all(scored):
        digest.update(np.array([-1, *scored], dtype="<i4").tobytes())
    return digest.digest()


def write_sequences(file: Path, model: str, dtype: str, found: dict[bytes, np.ndarray]) -> None:
    """Write log-probs of sequences, whole or not at all.

    model: identity. dtype: of its weights. found: by digest, of every scored token, fp32.

    Raises:
        OSError: it cannot be written.
    """
    order = sorted(found)
    lengths = np.array([len(found[digest]) for digest in order], dtype=np.int32)
    values_T = np.concatenate([np.zeros(0, np.float32), *(found[digest] for digest in order)])
    offsets = np.concatenate([[0], lengths.cumsum()]).astype(np.int64)
    sums = [np.float32(np.sum(found[digest], dtype=np.float64)) for digest in order]
    table = pyarrow.table(
        {
            "digest": pyarrow.array(order, pyarrow.binary()),
            "logps": pyarrow.array(np.array(sums, dtype=np.float32)),
            "tokens": pyarrow.array(lengths),
            "token_logps": pyarrow.LargeListArray.from_arrays(offsets, values_T),
        }
    )
    manifest = {"format": FORMAT, "model": model, "dtype": dtype}
    table = table.replace_schema_metadata({KEY: json.dumps(manifest)})
    content = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table, content, write_page_checksum=True)
    durable.write_file(file, content.getvalue().to_pybytes())


@dataclass(frozen=True)
class SequenceLogps:
    """A file of them. manifest: its metadata."""

    file: Path
    manifest: dict[str, Any]
    table: pyarrow.Table

    def fits(self, request: Request) -> bool:
        """Whether they are of the request's model, in its dtype."""
        return (self.manifest["model"], self.manifest["dtype"]) == (request.model, request.dtype)

    @cached_property
    def _starts(self) -> np.ndarray:
        lengths = self.table["tokens"].to_numpy().astype(np.int64)
        return np.concatenate([[0], lengths.cumsum()])

    @cached_property
    def _values_T(self) -> np.ndarray:
        return pyarrow.compute.list_flatten(self.table["token_logps"]).to_numpy()

    def values(self, place: int) -> np.ndarray:
        """The log-probs of the scored tokens of the sequence at a place, fp32."""
        return self._values_T[self._starts[place] : self._starts[place + 1]]


def read_sequences(file: Path) -> SequenceLogps:
    """Raises UserError if it is not there, or is damaged."""
    try:
        table = pyarrow.parquet.read_table(file, page_checksum_verification=True)
        manifest = json.loads(table.schema.metadata[KEY])
        if manifest["format"] != FORMAT:
            raise ValueError(f"format {manifest['format']}, and this version reads {FORMAT}")
        manifest["model"], manifest["dtype"], table["digest"], table["tokens"], table["token_logps"]
    except (OSError, ValueError, KeyError, TypeError, pyarrow.ArrowException) as error:
        raise UserError(
            f"{file} holds no log-probs of sequences, or is damaged ({durable.first_line(error)}); remove "
            "it, and the reference is computed"
        ) from None
    return SequenceLogps(file, manifest, table)


def fill(folder: Path, request: Request, known: Iterable[SequenceLogps]) -> bool:
    """Store a request's reference in `folder`, made of log-probs that are known.

    Returns:
        False if some sequence of the examples is not among them: nothing is written then.

    Raises:
        UserError: the folder was begun for something else, or cannot be written.
    """
    known = [each for each in known if each.fits(request)]
    values = _found(known, request.examples) if known else None
    if values is None:
        return False
    files = sorted({str(each.file) for each in known})
    growing = Growing(folder, request.manifest, {"split": request.name})
    try:
        growing.begin({"filled_from": files})
        for rows in blocks(look(Place(folder), request).absent_P.nonzero()[0]):
            lengths = request.examples.lengths.take(rows)
            values_T = torch.from_numpy(values(rows))
            table = part_table(values_T, lengths, request.examples, rows, request.per_token)
            growing.add(table)
    finally:
        growing.close()
    return True


def _found(
    known: list[SequenceLogps], examples: Dataset
) -> Callable[[np.ndarray], np.ndarray] | None:
    """What gives the log-probs of all scored tokens of some examples; None if some are unknown."""
    digests = [digest for index in range(len(examples)) for digest in _digests(examples, index)]
    places = [
        find_rows(each.table, pyarrow.array(digests, pyarrow.binary())).to_pylist()
        for each in known
    ]
    where: list[tuple[int, int]] = []
    for row in zip(*places):
        source = next((number for number, place in enumerate(row) if place is not None), None)
        if source is None:
            return None
        where.append((source, row[source]))
    starts = np.concatenate([examples.lengths.starts_P, [len(where)]])

    def values(rows: np.ndarray) -> np.ndarray:
        sequences = [each for row in rows for each in where[starts[row] : starts[row + 1]]]
        return np.concatenate([known[source].values(place) for source, place in sequences])

    return values


def _digests(examples: Dataset, index: int) -> list[bytes]:
    example, kind = examples[index], examples.kind
    answers = zip(kind.answer_ids(example), kind.answer_flags(example))
    return [sequence_digest(example["prompt_ids"], ids, flags) for ids, flags in answers]
