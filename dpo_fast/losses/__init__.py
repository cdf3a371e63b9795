"""Preference losses: pure functions of sequence log-probabilities, one table, weighted sums of them.

`preference` is imported when it is first used: it needs PyTorch, and the table alone does not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dpo_fast.losses.custom import register_loss
from dpo_fast.losses.logps import GroupLogps, PairLogps, SequenceLogps
from dpo_fast.losses.objective import Objective, Totals
from dpo_fast.losses.options import LossOptions
from dpo_fast.losses.table import LOSSES, LossSpec

if TYPE_CHECKING:
    from dpo_fast.losses.from_tokens import Preference, ScoredGroups, preference

__all__ = [
    "LOSSES",
    "GroupLogps",
    "LossOptions",
    "LossSpec",
    "Objective",
    "PairLogps",
    "Preference",
    "ScoredGroups",
    "SequenceLogps",
    "Totals",
    "preference",
    "register_loss",
]


def __getattr__(name: str):
    if name not in ("Preference", "ScoredGroups", "preference"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dpo_fast.losses import from_tokens

    return getattr(from_tokens, name)
