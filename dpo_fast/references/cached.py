"""A stored reference as a provider. Rows are found by the digest of their token ids."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.compute
import torch
from torch import Tensor

from dpo_fast.data.batch import ScoredBatch
from dpo_fast.data.kinds import PAIRS, Kind
from dpo_fast.references.artefact import names_of, read_columns


class CachedReference:
    """Looks up the stored rows of a batch's examples.

    sums: fp32, summed log-probs of the answers of all rows, one row after the other; NaN for rows that
        the run does not ask for and nobody has scored.
    counts: int64, answers of each row, on the same device.
    tokens: with token log-probs, a column for each answer: lists of fp32; of groups lists of lists. They
        stay in Arrow's memory and take a sixth of what Python floats take.
    places: the position of each row in `tokens`.
    """

    def __init__(
        self, sums: Tensor, counts: Tensor, tokens: tuple[pyarrow.ChunkedArray, ...] = (), places=()
    ) -> None:
        self.sums, self.counts = sums, counts
        self.starts = counts.cumsum(0) - counts
        self.tokens, self.places = tokens, places

    def __call__(self, batch: ScoredBatch) -> Tensor:
        """Sequence log-probabilities, fp32 [S], on the batch's device."""
        S = len(batch.lengths_S)
        rows_P = batch.indices_P.to(self.counts.device, non_blocking=True)
        counts_P = self.counts[rows_P]
        first_P = self.starts[rows_P] - (counts_P.cumsum(0) - counts_P)
        places_S = first_P.repeat_interleave(counts_P, output_size=S)  # waits for nothing on a GPU
        places_S = places_S + torch.arange(S, device=places_S.device)
        return self.sums[places_S].to(batch.input_ids.device, non_blocking=True)

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
        values = [_floats(column[place].values) for place in places for column in self.tokens]
        values_T = np.concatenate(values) if values else np.zeros(0, np.float32)
        return torch.from_numpy(values_T).to(batch.input_ids.device, non_blocking=True)


def _floats(values: pyarrow.Array) -> np.ndarray:
    """The values of one answer, or of all answers of a group."""
    nested = pyarrow.types.is_list(values.type)
    return (values.flatten() if nested else values).to_numpy()


def find_rows(table: pyarrow.Table, digests: pyarrow.Array) -> pyarrow.Array:
    """The position of each digest in a table, int32; null where it is absent. The first of equal rows."""
    return pyarrow.compute.index_in(digests, value_set=table["digest"].combine_chunks())


def open_reference(
    folders: list[Path],
    digests: pyarrow.Array,
    per_token: bool,
    device: torch.device | str,
    kind: Kind = PAIRS,
    wanted_P: np.ndarray | None = None,
) -> CachedReference:
    """The reference of a split.

    folders: together they hold all rows that are wanted.
    digests: of the rows of the split, in order.
    per_token: whether token log-probs are read too.
    device: where the sums are kept.
    wanted_P: bool [P], the rows that will be asked for; None: all.

    Raises:
        UserError: a folder is damaged.
        ValueError: a row that is wanted is in none of the folders.
    """
    if not folders:  # nothing is asked for: a run that has no step left
        return CachedReference(torch.zeros(0, device=device), torch.zeros(0, device=device).long())
    sums_of, tokens_of = names_of(kind, "logps"), names_of(kind, "token_logps")
    wanted = ["digest", *sums_of, *(tokens_of if per_token else ())]
    table = pyarrow.concat_tables([read_columns(folder, wanted) for folder in folders])
    places = find_rows(table, digests)
    absent_P = places.is_null().to_numpy(zero_copy_only=False)
    missing = absent_P if wanted_P is None else absent_P & wanted_P
    if missing.any():
        raise ValueError(f"{missing.sum()} of {len(digests)} {kind.name} are not in {folders}")
    columns = [table[name].take(places) for name in sums_of]  # null where a row is absent
    if kind.many:
        lengths = pyarrow.compute.list_value_length(columns[0])
        counts = pyarrow.compute.fill_null(lengths, 0).to_numpy()
        sums = pyarrow.compute.list_flatten(columns[0]).to_numpy()
    else:
        counts = np.full(len(places), len(columns))
        sums = np.stack([column.to_numpy() for column in columns], axis=1).reshape(-1)
    tokens = tuple(table[name] for name in tokens_of) if per_token else ()
    sums = torch.from_numpy(sums.copy()).to(device)
    counts = torch.from_numpy(counts.astype(np.int64)).to(device)
    return CachedReference(sums, counts, tokens, places.fill_null(-1).to_numpy())
