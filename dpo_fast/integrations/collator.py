"""Pairs of token ids to the batches of `PreferenceTrainer`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dpo_fast.data.batch import collate
from dpo_fast.data.kinds import PAIRS
from dpo_fast.wording import quoted

IDS = PAIRS.ids
NUMBERS = PAIRS.numbers


@dataclass(frozen=True)
class PreferenceCollator:
    """A data collator for rows with `prompt_ids`, `chosen_ids` and `rejected_ids`, lists of int.

    A row may also have these floats: the sums of a reference's log-probs, `reference_chosen_logps`
    and `reference_rejected_logps`, and `weight`, `margin` and `soft_label`. The lists of bool
    `chosen_scored` and `rejected_scored` say which tokens are scored; without them all are.

    layout, pad_id: as in `collate`.
    vocabulary: ids that the model has; None: they are not checked.
    """

    layout: str = "padded"
    pad_id: int = 0
    vocabulary: int | None = None

    def __call__(self, rows: Sequence[Mapping]) -> dict:
        """{"batch": ScoredBatch}: trainers want a dictionary.

        Raises:
            ValueError: an empty prompt or completion, ids that are none of the model's, or a column that
                some rows have and some not.
        """
        if self.vocabulary is not None:
            for row in rows:
                _check_ids(row, self.vocabulary)
        columns = [name for name in NUMBERS if any(row.get(name) is not None for row in rows)]
        for name in columns:
            missing = sum(row.get(name) is None for row in rows)
            if missing:
                raise ValueError(
                    f"{missing} of {len(rows)} rows have no {name}: give it to all or to none"
                )
        batch = collate(rows, self.layout, pad_id=self.pad_id, columns=columns)
        return {"batch": batch}


def _check_ids(row: Mapping, vocabulary: int) -> None:
    for name in IDS:
        try:
            ids = np.asarray(row[name])
        except ValueError:  # lists of unequal lengths
            ids = np.zeros((0, 0))
        if ids.ndim != 1 or ids.size and not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(f"{name} is no list of int, but {quoted(row[name])}")
        wrong = ids[(ids < 0) | (ids >= vocabulary)]
        if wrong.size:
            raise ValueError(
                f"{name} has the id {wrong[0]}, and the model those from 0 to {vocabulary - 1}. What is "
                "not scored is no -100 here: chosen_scored and rejected_scored say it"
            )
