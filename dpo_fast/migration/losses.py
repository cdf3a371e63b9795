"""The section `loss` of a draft."""

from __future__ import annotations

from dpo_fast.losses import LOSSES, LossOptions
from dpo_fast.migration.draft import Draft
from dpo_fast.migration.option import flag

OURS = LossOptions()


def put_losses(draft: Draft, weights: dict[str, float], *names: str, comment: str = "") -> None:
    """The losses by name, with their weights.

    names: of the options that say so.
    """
    losses = list(weights)
    draft.put("loss.type", losses if len(losses) > 1 else losses[0], *names, comment=comment)
    if len(losses) > 1 and set(weights.values()) != {1.0}:
        draft.put("loss.weights", list(weights.values()), *names)


def put_option(draft: Draft, losses: list[str], ours: str, value, name: str) -> None:
    """An option of the losses, or a word that it changes nothing: where no loss uses it, "
    "theirs do not either."""
    used = any(ours in LOSSES[loss].options for loss in losses)
    if not used:
        if name in draft.given:
            draft.spare(name, f"{', '.join(losses)} do not use it, there either")
        return
    if isinstance(getattr(OURS, ours), bool):
        value = flag(value)
    elif value is not None and not isinstance(value, str):
        value = float(value)
    if value is not None and (name in draft.given or value != getattr(OURS, ours)):
        draft.put(f"loss.{ours}", value, name)
