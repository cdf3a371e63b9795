"""Several stored parts as one data set: whether they are alike, their shares, what is held out of each."""

from __future__ import annotations

from collections.abc import Sequence

import datasets
import numpy as np

from dpo_fast.data.config import DataConfig
from dpo_fast.data.entries import Entries, path_of
from dpo_fast.data.folders import Role
from dpo_fast.data.kinds import Kind, OneKind, kind_of
from dpo_fast.data.mixture import Mixture, quotas, shares
from dpo_fast.data.report import SourceShare
from dpo_fast.errors import UserError


def check_alike(tables: Sequence[datasets.Dataset]) -> None:
    """Raises UserError for parts of different kinds, or a column of numbers that only some have."""
    seen, first = OneKind(), tables[0]
    for table in tables:
        seen.see(table[0]["where"], kind_of(table.column_names), chat=False)
        for name in seen.kind.numbers:
            having, lacking = first, table
            if name in table.column_names:
                having, lacking = table, first
            if name in having.column_names and name not in lacking.column_names:
                raise UserError(
                    f"{lacking[0]['where']}: no {name!r}, which {having[0]['where']} has; give every row "
                    "of all sources a value, or none"
                )


def source_shares(
    entries: Entries, sizes: Sequence[int], config: DataConfig, mixture: Mixture | None
) -> list[SourceShare]:
    """What each source gives to an epoch. sizes: examples of each that may be trained on."""
    names = list(map(path_of, entries))
    if mixture is None:
        return [SourceShare(name, size, None, size) for name, size in zip(names, sizes)]
    planned = map(float, shares(config.weights))
    return [SourceShare(*each) for each in zip(names, sizes, planned, mixture.quotas)]


def split_rows(
    sizes: Sequence[int], kind: Kind, config: DataConfig, split: Role
) -> list[np.ndarray]:
    """Rows of the table for training, or those held out for evaluation, in file order.

    sizes: examples of each part. With weights each is split alone, and as many are held out of each as
        its weight asks for, so that the evaluation is on the same mixture; else all are split together.
    """
    if not config.weights:
        return [_split(sum(sizes), config.eval_rows, kind, config, split, "")]
    held_out = quotas(config.eval_rows, shares(config.weights))
    named = [f" of {path_of(entry)}" for entry in config.train_entries]
    rows = [
        _split(size, count, kind, config, split, name)
        for size, count, name in zip(sizes, held_out, named)
    ]
    starts = np.cumsum((0, *sizes[:-1]))
    return [start + each for start, each in zip(starts, rows)]


def _split(
    size: int, held_out: int, kind: Kind, config: DataConfig, split: Role, name: str
) -> np.ndarray:
    if held_out >= size:
        share = f" ({held_out} of them{name})" if name else ""
        raise UserError(
            f"data.eval_rows={config.eval_rows}{share} leaves nothing to train on: there are {size} "
            f"usable {kind.name}{name}; try {max(config.eval_rows * size // held_out // 10, 1)}"
        )
    shuffled = np.random.default_rng(config.seed).permutation(size)
    training, evaluation = np.split(shuffled, [size - held_out])
    return np.sort(evaluation if split == "eval" else training)
