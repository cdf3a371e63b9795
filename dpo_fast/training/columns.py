"""Columns of numbers in the data: which a run uses, and that none is ignored."""

from __future__ import annotations

from dpo_fast.data.kinds import KINDS, Kind
from dpo_fast.errors import UserError
from dpo_fast.training.config import RunConfig

REFERENCES = {name for kind in KINDS for name in kind.reference_columns}


def used_columns(config: RunConfig, present: list[str], kind: Kind) -> tuple[str, ...]:
    """Names of the columns that go into batches: all that are there, if the run uses all.

    Raises:
        UserError: a column that would change the loss and that this loss does not use, or one that it
            needs and that is not there.
    """
    objective, names = config.loss.objective, ", ".join(config.loss.names)
    used, needed = set(objective.columns), set(objective.needed_columns)
    if config.reference_provider == "columns":
        used |= set(kind.reference_columns)
        needed |= set(kind.reference_columns)
    idle = [column for column in present if column not in used]
    if stored := [column for column in idle if column in REFERENCES]:
        raise UserError(
            f"the data has the columns {' and '.join(stored)}, and reference.provider="
            f"{config.reference_provider} takes them from elsewhere: set reference.provider=columns, or "
            "leave them out with data.columns"
        )
    if idle:
        raise UserError(
            f"the data has the columns {', '.join(idle)}, which loss.type={names} does not use; rename or "
            "remove them in the data, or choose another loss (docs/LOSSES.md says which uses what)"
        )
    if missing := sorted(needed - set(present)):
        raise UserError(
            f"the data has no columns {', '.join(missing)}, which loss.type={names} with "
            f"reference.provider={config.reference_provider} needs; name yours with data.columns"
        )
    return tuple(present)
