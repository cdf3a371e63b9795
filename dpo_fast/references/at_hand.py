"""Log-probs of a reference that happen to be there, for a look at the data: no model is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dpo_fast.data.kinds import PAIRS
from dpo_fast.references.artefact import MANIFEST, names_of, read_columns, read_manifest
from dpo_fast.references.cached import find_rows


def logps_at_hand(folder: Path, pairs: Any) -> np.ndarray | None:
    """Sums for the chosen and the rejected answer of every pair, fp64 [P, 2]; None if some are missing.

    They come with the data, or from a stored reference in a folder of `folder`.

    Raises:
        UserError: what is stored is damaged.
    """
    if pairs.kind != PAIRS or not hasattr(pairs, "digests") or not len(pairs):
        return None
    rows = range(len(pairs))
    if set(PAIRS.reference_columns) <= set(pairs.numbers):
        columns = [pairs.column(name, rows) for name in PAIRS.reference_columns]
        return np.stack([column.to_numpy(zero_copy_only=False) for column in columns], axis=1)
    names = names_of(PAIRS, "logps")
    for manifest in sorted(folder.glob(f"*/{MANIFEST}")):
        if read_manifest(manifest.parent).get("parts") == {}:  # nothing is scored yet
            continue
        table = read_columns(manifest.parent, ["digest", *names])
        places = find_rows(table, pairs.digests)
        if not places.null_count:
            sums = [table[name].take(places).to_numpy() for name in names]
            return np.stack(sums, axis=1).astype(np.float64)
    return None
