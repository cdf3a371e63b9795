"""One row of the table of losses, and how a function becomes one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dpo_fast.losses.logps import Logps
from dpo_fast.losses.options import LossOptions

if TYPE_CHECKING:
    from torch import Tensor

ALONE = ("token_clamp", "reference_free")  # options of sums that need no pair
SUM_OPTIONS = ("ld_alpha", "ld_reference", *ALONE)
WEIGHTING = ("use_weighting", "weighting_clamp")
DIVERGENCE = ("f_divergence_type", "f_alpha_divergence_coef")
SHARED = (*SUM_OPTIONS, *WEIGHTING, *DIVERGENCE)  # options that all losses of a mixture must use
LOSSES: dict[str, LossSpec] = {}


@dataclass(frozen=True)
class LossSpec:
    """One loss.

    function: from log-probabilities and options to values, [P] for pairs, [S] otherwise.
    formula, source, when: its text in docs/LOSSES.md.
    options: names of the fields of `LossOptions` that change it.
    columns: columns of the data that it uses.
    needs_columns: those of them that it cannot do without.
    needs_options: options that cannot stay at their defaults, and why.
    kind: what it takes: `pairs`; `completions`, also those of pairs; or `groups`.
    single: whether, of pairs, it sees the chosen answer alone, so that it takes desirable completions too.
    needs_reference: whether it compares with a reference.
    reference_option: the option that brings in a reference where it is above 0.
    by_token: whether it needs log-probs of every token, also under the model that wrote the completions.
    normaliser: the field of `Totals` that the sum over the global batch is divided by.
    sft: weight of the sft term that it adds.
    coupled: whether pairs of the global batch enter into each other's values.
    statistics: what the trainer estimates for it over all ranks: `kl`, `delta`.
    kernel: whether the Triton kernel of `preference` computes it, under the same name.
    divides: whether it divides a completion's log-probability by its length.
    watch: gives values by name, whose means are plotted beside the loss.
    """

    name: str
    function: Callable[[Logps, LossOptions], Tensor]
    formula: str
    source: str
    when: str
    options: tuple[str, ...]
    columns: tuple[str, ...] = ("weight",)
    needs_columns: tuple[str, ...] = ()
    needs_options: Mapping[str, str] = field(default_factory=dict)
    kind: str = "pairs"
    single: bool = False
    needs_reference: bool = True
    reference_option: str | None = None
    by_token: bool = False
    normaliser: str = "pairs"
    sft: Callable[[LossOptions], float] = lambda options: 0.0
    coupled: bool = False
    statistics: tuple[str, ...] = ()
    kernel: bool = False
    divides: Callable[[LossOptions], bool] = lambda options: False
    watch: Callable[[Logps, LossOptions], dict[str, Tensor]] | None = None

    @property
    def paired(self) -> bool:
        return self.kind == "pairs"

    @property
    def grouped(self) -> bool:
        return self.kind == "groups"

    def compares(self, options: LossOptions) -> bool:
        """Whether it compares with a reference under these options."""
        option = self.reference_option
        return self.needs_reference or (option is not None and getattr(options, option) > 0)


def loss(formula: str, source: str, when: str, options: tuple[str, ...], **facts):
    """Decorator: add a function to the table under its name. facts: other fields of `LossSpec`."""

    def add(function):
        name = function.__name__
        LOSSES[name] = LossSpec(name, function, formula, source, when, options, **facts)
        return function

    return add
