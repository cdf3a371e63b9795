"""One row of the table of losses, and how a function becomes one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from dpo_fast.losses.logps import GroupLogps, PairLogps, SequenceLogps
from dpo_fast.losses.options import LossOptions

SUMS = ("ld_alpha", "ld_reference", "token_clamp", "reference_free")
WEIGHTING = ("use_weighting", "weighting_clamp")
DIVERGENCE = ("f_divergence_type", "f_alpha_divergence_coef")
SHARED = (*SUMS, *WEIGHTING, *DIVERGENCE)  # options that concern every loss of a mixture
LOSSES: dict[str, LossSpec] = {}


@dataclass(frozen=True)
class LossSpec:
    """function: of `PairLogps`, `SequenceLogps` or `GroupLogps`, and options, gives [P], or [S].

    rows: `pairs`; `completions`, which may also be those of pairs; or `groups`.

    options: names of the fields of `LossOptions` that change it. columns: of the data that it uses;
    those in `needs_columns` it needs. needs_options: those that cannot stay at their defaults, and why.
    reference_option: one that brings a reference in where it is above 0. by_token: whether it goes by
    tokens, and by what the model that wrote them gave them. normaliser: what the sum over rows is
    divided by, globally. sft: weight of the sft term that it brings along. coupled: whether rows of the
    global batch enter into each other's values. statistics: what the trainer estimates for it over all
    ranks. kernel: whether the Triton kernel of `preference` computes it, under the same name. divides:
    whether a completion's log-probability is divided by its length. watch: gives values whose means people
    plot beside the loss, by name.
    """

    name: str
    function: Callable[[PairLogps | SequenceLogps | GroupLogps, LossOptions], Tensor]
    formula: str
    source: str
    when: str
    options: tuple[str, ...]
    columns: tuple[str, ...] = ("weight",)
    needs_columns: tuple[str, ...] = ()
    needs_options: Mapping[str, str] = field(default_factory=dict)
    rows: str = "pairs"
    needs_reference: bool = True
    reference_option: str | None = None
    by_token: bool = False
    normaliser: str = "pairs"
    sft: Callable[[LossOptions], float] = lambda options: 0.0
    coupled: bool = False
    statistics: tuple[str, ...] = ()
    kernel: bool = False
    divides: Callable[[LossOptions], bool] = lambda options: False
    watch: Callable[[PairLogps | GroupLogps, LossOptions], dict[str, Tensor]] | None = None

    @property
    def paired(self) -> bool:
        return self.rows == "pairs"

    @property
    def grouped(self) -> bool:
        return self.rows == "groups"

    def compares(self, options: LossOptions) -> bool:
        """Whether it compares with a reference."""
        option = self.reference_option
        return self.needs_reference or (option is not None and getattr(options, option) > 0)


def loss(formula: str, source: str, when: str, options: tuple[str, ...], **columns):
    """Decorator: add a function to the table under its name."""

    def add(function):
        name = function.__name__
        LOSSES[name] = LossSpec(name, function, formula, source, when, options, **columns)
        return function

    return add
