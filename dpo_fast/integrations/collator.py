"""Pairs of token ids to the batches of `PreferenceTrainer`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dpo_fast.data.batch import collate
from dpo_fast.data.kinds import PAIRS

IDS = PAIRS.ids
NUMBERS = PAIRS.numbers


@dataclass(frozen=True)
class PreferenceCollator:
    """A data collator for rows with `prompt_ids`, `chosen_ids` and `rejected_ids`, lists of int.

    A row may also have these floats: the sums of a reference's log-probs, `reference_chosen_logps`
    and `reference_rejected_logps`, and `weight`, `margin` and `soft_label`. The lists of bool
    `chosen_scored` and `rejected_scored` say which tokens are scored; without them all are.

    layout, pad_id: as in `collate`.
    """

    layout: str = "padded"
    pad_id: int = 0

    def __call__(self, rows: Sequence[Mapping]) -> dict:
        """{"batch": ScoredBatch}: trainers want a dictionary.

        Raises:
            ValueError: an empty prompt or completion, or a column that some rows have and some not.
        """
        columns = [name for name in NUMBERS if any(row.get(name) is not None for row in rows)]
        for name in columns:
            missing = sum(row.get(name) is None for row in rows)
            if missing:
                raise ValueError(
                    f"{missing} of {len(rows)} rows have no {name}: give it to all or to none"
                )
        batch = collate(rows, self.layout, pad_id=self.pad_id, columns=columns)
        return {"batch": batch}
