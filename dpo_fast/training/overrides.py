"""Which options, of those that a run has, change what another command makes of the run."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from dpo_fast.errors import UserError


def check_used(overrides: Sequence[str], used: Collection[str], command: str) -> None:
    """Raises UserError for a key=value that a command would ignore.

    overrides: whose keys exist.
    used: sections, and keys as in `train.layout`; what is below one of them counts as well.
    command: what is made, for the message.
    """
    for override in overrides:
        name = override.partition("=")[0]
        if not any(f"{name}.".startswith(f"{each}.") for each in used):
            raise UserError(f"{name} changes nothing of {command}; {', '.join(used)} do")
