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
    """Looks up a batch's rows.

    sums_A: fp32, of the answers of all rows, one row after the other. counts_R: int64, answers of each
    row, on the same device. tokens: where token values are stored, a list column for each answer, or of
    groups one of lists of lists; places_R: the row in them of each row. They stay in Arrow's memory: a
    Python float takes six times the room.
    """

    def __init__(
        self,
        sums_A: Tensor,
        counts_R: Tensor,
        tokens: tuple[pyarrow.ChunkedArray, ...] = (),
        places_R=(),
    ) -> None:
        self.sums_A, self.counts_R = sums_A, counts_R
        self.starts_R = counts_R.cumsum(0) - counts_R
        self.tokens, self.places_R = tokens, places_R

    def __call__(self, batch: ScoredBatch) -> Tensor:
        """Sequence log-probabilities, fp32 [S], on the batch's device."""
        rows_P, S = batch.indices_P.to(self.counts_R.device), len(batch.lengths_S)
        counts_P = self.counts_R[rows_P]
        first_P = self.starts_R[rows_P] - (counts_P.cumsum(0) - counts_P)
        places_S = first_P.repeat_interleave(counts_P, output_size=S)  # waits for nothing on a GPU
        places_S = places_S + torch.arange(S, device=places_S.device)
        return self.sums_A[places_S].to(batch.input_ids.device, non_blocking=True)

    def token_logps(self, batch: ScoredBatch) -> Tensor:
        """Log-probability of every scored token, fp32 [T], on the batch's device.

        Raises:
            ValueError: only sums are stored.
        """
        if not self.tokens:
            raise ValueError(
                "this reference holds sums only; compute it with reference.per_token=true"
            )
        places = [int(self.places_R[row]) for row in batch.indices_P.tolist()]
        values = [_floats(column[place].values) for place in places for column in self.tokens]
        values_T = np.concatenate(values) if values else np.zeros(0, np.float32)
        return torch.from_numpy(values_T).to(batch.input_ids.device)


def _floats(values: pyarrow.Array) -> np.ndarray:
    """Of one answer, or of all answers of a group."""
    nested = pyarrow.types.is_list(values.type)
    return (values.flatten() if nested else values).to_numpy()


def find_rows(table: pyarrow.Table, digests: pyarrow.Array) -> pyarrow.Array:
    """The row of each digest in a table, int32, null where there is none. Of equal rows the first."""
    return pyarrow.compute.index_in(digests, value_set=table["digest"].combine_chunks())


def open_reference(
    folders: list[Path],
    digests: pyarrow.Array,
    per_token: bool,
    device: torch.device | str,
    kind: Kind = PAIRS,
) -> CachedReference:
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
    sums = [table[name].take(places) for name in sums_of]
    if kind.many:
        counts_R = pyarrow.compute.list_value_length(sums[0]).to_numpy()
        sums_A = pyarrow.compute.list_flatten(sums[0]).to_numpy()
    else:
        counts_R = np.full(len(places), len(sums))
        sums_A = np.stack([column.to_numpy() for column in sums], axis=1).reshape(-1)
    tokens = tuple(table[name] for name in tokens_of) if per_token else ()
    sums_A = torch.from_numpy(sums_A.copy()).to(device)
    counts_R = torch.from_numpy(counts_R.astype(np.int64)).to(device)
    return CachedReference(sums_A, counts_R, tokens, places.to_numpy())
