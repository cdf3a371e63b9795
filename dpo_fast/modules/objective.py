"""The losses of a module, whose names and options are attributes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from torch import nn

from dpo_fast.losses import LossOptions, Objective


def make_objective(
    loss_type: str | Sequence[str], loss_weights: Sequence[float] | None, options: dict
) -> Objective:
    """Names, weights (1 each by default) and options, under TRL's names, as one `Objective`."""
    names = (loss_type,) if isinstance(loss_type, str) else _several("loss_type", loss_type)
    weights = (1.0,) * len(names)
    if loss_weights is not None:
        weights = _several("loss_weights", loss_weights)
    return Objective(names, weights, LossOptions(**options))


def _several(name: str, given) -> tuple:
    try:
        return tuple(given)
    except TypeError:
        raise ValueError(f"{name}={given!r}: expected one for each loss, in a list") from None


class ObjectiveModule(nn.Module):
    """A module with losses of the table.

    `loss_type`, `loss_weights` and the fields of `LossOptions` are attributes. What is set counts from the
    next call on. What cannot be honoured is an error of that call, so that several attributes can be set in
    any order.

    Raises:
        ValueError: naming the option, its value and what it must be.
    """

    # Type checkers know these; the properties are made below, for every option alike.
    loss_type: str | Sequence[str]
    loss_weights: Sequence[float] | None
    beta: float
    label_smoothing: float

    def __init__(
        self,
        loss_type: str | Sequence[str],
        loss_weights: Sequence[float] | None = None,
        options: dict | None = None,
    ) -> None:
        super().__init__()
        self._settings = {"loss_type": loss_type, "loss_weights": loss_weights, **(options or {})}
        self._objective: Objective | None = self._made()

    @property
    def objective(self) -> Objective:
        """The losses as they are set now."""
        return self._made() if self._objective is None else self._objective

    def check_objective(self, objective: Objective) -> None:
        """Raises ValueError for what this kind of module cannot compute."""

    def extra_repr(self) -> str:
        """What is set, whether it can be honoured or not."""
        given = {name: value for name, value in self._settings.items() if value is not None}
        return ", ".join(f"{name}={value!r}" for name, value in given.items())

    def _made(self) -> Objective:
        options = dict(self._settings)
        objective = make_objective(options.pop("loss_type"), options.pop("loss_weights"), options)
        self.check_objective(objective)
        return objective

    def _setting(self, name: str):
        default = getattr(LossOptions, name, None)
        return self._settings.get(name, default)

    def _set(self, name: str, value) -> None:
        self._settings = self._settings | {name: value}
        try:
            self._objective = self._made()
        except (TypeError, ValueError):
            self._objective = None  # the next call makes it again, and says what is wrong


def setting(name: str) -> property:
    """An attribute that reads and sets `loss_type`, `loss_weights` or a field of `LossOptions`."""
    return property(
        lambda module: module._setting(name), lambda module, value: module._set(name, value)
    )


for _name in ("loss_type", "loss_weights", *(field.name for field in fields(LossOptions))):
    setattr(ObjectiveModule, _name, setting(_name))
