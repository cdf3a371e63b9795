"""Preference losses: pure functions of sequence log-probabilities, one table, weighted sums of them."""

from dpo_fast.losses.logps import GroupLogps, PairLogps, SequenceLogps
from dpo_fast.losses.objective import Objective, Totals
from dpo_fast.losses.options import LossOptions
from dpo_fast.losses.preference import Preference, ScoredGroups, preference
from dpo_fast.losses.table import LOSSES, LossSpec

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
]
