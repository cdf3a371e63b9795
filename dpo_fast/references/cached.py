"""Reference log-probabilities looked up in what is stored, a row by the digest of its token ids."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.compute
import torch
from torch import Tensor

from dpo_fast.data.batch import ScoredBatch
from dpo_fast.data.kinds import PAIRS, Kind
from dpo_fast.references.artefact import names_of, read_rows


class CachedReference:
    """Looks up a batch's rows in a table of [rows, answers] fp32: chosen and rejected, or completions.

    tokens: where token values are stored, a list column for each answer, and the row in them of each
    row of the table. They stay in Arrow's memory: a Python float takes six times the room.
    """

    def __init__(
        self, table: Tensor, tokens: tuple[pyarrow.ChunkedArray, ...] = (), places=()
    ) -> None:
        self.table, self.tokens, self.places = table, tokens, places

    def __call__(self, batch: ScoredBatch) -> Tensor:
        """Sequence log-probabilities, fp32 [S], on the batch's device."""
        rows_P = batch.indices_P.to(self.table.device)
        return self.table[rows_P].flatten().to(batch.input_ids.device, non_blocking=True)

    def token_logps(self, batch: ScoredBatch) -> Tensor:
        """Log-probability of every scored token, fp32 [T], on the batch's device.

        Raises:
            ValueError: only sums are stored.
        """
        if not self.tokens:
            raise ValueError(
                "this reference holds sums only; compute it with reference.per_token=true"
            )
        places = [int(self.places[row]) for row in batch.indices_P.tolist()]
        values = [column[place].values.to_numpy() for place in places for column in self.tokens]
        values_T = np.concatenate(values) if values else np.zeros(0, np.float32)
        return torch.from_numpy(values_T).to(batch.input_ids.device)


def find_rows(table: pyarrow.Table, digests: pyarrow.Array) -> pyarrow.Array:
    """The row of each digest in a table, int32, null where there is none. Of equal rows the first."""
    return pyarrow.compute.index_in(digests, value_set=table["digest"].combine_chunks())


def open_reference(
    folders: list[Path], digests: pyarrow.Array, per_token: bool, device: torch.device | str,
    kind: Kind = PAIRS,
) -> CachedReference:  # fmt: skip
    """The reference of rows, given by their digests in order, all of which the folders hold.

    Raises:
        UserError: a folder is damaged.
    """
    sums_of, tokens_of = names_of(kind, "logps"), names_of(kind, "token_logps")
    columns = ["digest", *sums_of, *(tokens_of if per_token else ())]
    table = pyarrow.concat_tables([read_rows(folder, columns) for folder in folders])
    places = find_rows(table, digests)
    if places.null_count:
        raise ValueError(f"{places.null_count} of {len(digests)} {kind.name} are not in {folders}")
    sums = np.stack([table[name].take(places).to_numpy() for name in sums_of], axis=1)
    tokens = tuple(table[name] for name in tokens_of) if per_token else ()
    return CachedReference(torch.from_numpy(sums).to(device), tokens, places.to_numpy())
