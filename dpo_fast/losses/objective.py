"""A weighted sum of losses, normalised over the whole global batch."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from dpo_fast.losses.logps import GroupLogps, PairLogps, SequenceLogps, spread
from dpo_fast.losses.options import LossOptions
from dpo_fast.losses.spec import SHARED, LossSpec
from dpo_fast.losses.sums import needs_reference_tokens
from dpo_fast.losses.table import LOSSES

Rows = PairLogps | SequenceLogps | GroupLogps


@dataclass(frozen=True)
class Totals:
    """Counts over the global batch: every micro-batch of every rank. They make the loss, and its
    gradient, independent of how the batch was split. pairs: or groups. sequences: by default 2 for each
    pair. tokens: scored tokens of all sequences, for losses that are averages over tokens."""

    pairs: int
    chosen_tokens: int
    sequences: int | None = None
    tokens: int = 0

    def __post_init__(self) -> None:
        if self.sequences is None:
            object.__setattr__(self, "sequences", 2 * self.pairs)


@dataclass(frozen=True)
class Objective:
    """sum_k weight_k * (sum over rows of loss_k) / total_k, and the sft terms that losses bring along.

    Raises:
        ValueError: an unknown name, weights that do not fit the names, an option that is changed and
            that none of the losses uses, or one that a loss needs and that is not.
    """

    names: tuple[str, ...] = ("sigmoid",)
    weights: tuple[float, ...] = (1.0,)
    options: LossOptions = LossOptions()

    def __post_init__(self) -> None:
        unknown = [name for name in self.names if name not in LOSSES]
        if unknown or not self.names:
            raise ValueError(f"loss {unknown} is not known; choose from {', '.join(LOSSES)}")
        if len(self.weights) != len(self.names):
            raise ValueError(
                f"weights={list(self.weights)}: expected one for each of the {len(self.names)} losses "
                f"{', '.join(self.names)}"
            )
        if not all(isinstance(w, numbers.Real) and math.isfinite(w) for w in self.weights):
            raise ValueError(f"weights={list(self.weights)}: each must be a finite number")
        self._check_rows()
        self._check_options()
        self._check_coupled()

    def _check_rows(self) -> None:
        groups = [spec.name for spec in self.specs if spec.grouped]
        others = [spec.name for spec in self.specs if not spec.grouped]
        if groups and others:
            raise ValueError(
                f"{', '.join(groups)} goes by groups of scored completions and {', '.join(others)} does "
                "not: no data serves both; choose losses of one kind"
            )

    def _check_options(self) -> None:
        """An option is used by some loss; one that changes what all losses see is used by all."""
        for spec in self.specs:
            for option in set(spec.needs_options) - set(self.options.changed):
                raise ValueError(
                    f"loss.{option}={getattr(self.options, option)} cannot be used by {spec.name}: "
                    f"{spec.needs_options[option]}"
                )
        # beta scales the rewards that are logged, whatever the loss.
        for option in [name for name in self.options.changed if name != "beta"]:
            idle = [spec.name for spec in self.specs if option not in spec.options]
            if len(idle) < len(self.specs):
                # What all losses see concerns them all, but for sft: it sees the plain sums.
                idle = [name for name in idle if option in SHARED and name != "sft"]
            if idle:
                takers = [name for name, spec in LOSSES.items() if option in spec.options]
                raise ValueError(
                    f"loss.{option}={getattr(self.options, option)} is not used by {', '.join(idle)}; "
                    f"remove it, or choose {' or '.join(takers)}"
                )

    def _check_coupled(self) -> None:
        """A loss whose rows meet gives no row a loss of its own that something could weigh."""
        if not self.coupled:
            return
        first = next(spec.name for spec in self.specs if spec.coupled)
        columns = [spec.name for spec in self.specs if spec.needs_columns]
        if columns:
            raise ValueError(
                f"{', '.join(columns)} goes by columns of the data, which {first} does not"
            )
        if self.options.changes_sums and (
            "sft" in self.names or self.sft_coefficient(Totals(1, 1))
        ):
            raise ValueError(
                f"loss.ld_alpha and loss.token_clamp change the sums that {first} sorts, and an sft term "
                "needs them as they are; leave out one of the two"
            )

    @property
    def specs(self) -> tuple[LossSpec, ...]:
        return tuple(LOSSES[name] for name in self.names)

    @property
    def needs_reference(self) -> bool:
        compares = any(spec.compares(self.options) for spec in self.specs)
        return compares and not self.options.reference_free

    @property
    def needs_reference_tokens(self) -> bool:
        """Whether sums of the reference are not enough."""
        by_token = any(spec.by_token and spec.compares(self.options) for spec in self.specs)
        return self.needs_reference and (by_token or needs_reference_tokens(self.options))

    @property
    def needs_old_tokens(self) -> bool:
        """Whether the log-probs are needed that the completions were written with."""
        return any(spec.by_token for spec in self.specs)

    @property
    def paired(self) -> bool:
        """Whether some loss needs pairs; the others take completions one by one as well."""
        return any(spec.paired for spec in self.specs)

    @property
    def grouped(self) -> bool:
        """Whether it goes by groups of scored completions."""
        return any(spec.grouped for spec in self.specs)

    @property
    def coupled(self) -> bool:
        return any(spec.coupled for spec in self.specs)

    @property
    def columns(self) -> frozenset[str]:
        """Of the data: those that some loss uses; none where rows meet, and have no loss of their own."""
        used = {column for spec in self.specs for column in spec.columns}
        return frozenset() if self.coupled else frozenset(used)

    @property
    def needed_columns(self) -> frozenset[str]:
        """Columns that some loss cannot do without."""
        return frozenset(column for spec in self.specs for column in spec.needs_columns)

    def check_inputs(self, columns: Iterable[str], statistics: Iterable[str] = ()) -> None:
        """Raises ValueError for a column or a statistic that no loss uses, or a column that one needs."""
        if unused := [column for column in columns if column not in self.columns]:
            why = ", as rows are sorted over the batch" if self.coupled else ""
            raise ValueError(
                f"losses {self.names} do not use the columns {unused}{why}; leave them out"
            )
        if missing := sorted(self.needed_columns - set(columns)):
            raise ValueError(f"losses {self.names} need the columns {missing}")
        if unused := sorted(set(statistics) - set(self.statistics)):
            raise ValueError(f"losses {self.names} do not use the statistics {unused}")

    def check_totals(self, totals: Totals, *, pairs: int, sequences: int, tokens: int) -> None:
        """Raises ValueError for a total below what these rows alone have: counts left at 0 would make a
        mean a sum. tokens: scored ones, of all sequences."""
        for spec in self.specs:
            here = {"pairs": pairs, "sequences": sequences, "tokens": tokens}.get(
                spec.normaliser, 0
            )
            count = getattr(totals, spec.normaliser)
            if here > count:
                raise ValueError(
                    f"totals.{spec.normaliser}={count}: {spec.name} divides by it, and these rows alone "
                    f"have {here}; give the count of the global batch"
                )
        if tokens and totals.chosen_tokens <= 0 and self.divides_by_chosen_tokens:
            raise ValueError(
                f"totals.chosen_tokens={totals.chosen_tokens}: losses {self.names} divide by the chosen "
                "tokens of the global batch; give their count"
            )

    @property
    def divides_by_chosen_tokens(self) -> bool:
        return any(
            spec.normaliser == "chosen_tokens" or spec.sft(self.options) != 0 for spec in self.specs
        )

    @property
    def statistics(self) -> tuple[str, ...]:
        """What has to be estimated over all ranks: `kl`, `delta`."""
        return tuple(sorted({name for spec in self.specs for name in spec.statistics}))

    def coefficients(self, totals: Totals) -> tuple[float, ...]:
        """What the sum over rows of each loss is multiplied by: weight_k / total_k."""
        return tuple(
            weight / max(getattr(totals, spec.normaliser), 1)
            for spec, weight in zip(self.specs, self.weights)
        )

    def sft_coefficient(self, totals: Totals) -> float:
        """What minus the sum of the chosen log-probs is multiplied by, for losses that bring it along."""
        weight = sum(w * spec.sft(self.options) for spec, w in zip(self.specs, self.weights))
        return weight / max(totals.chosen_tokens, 1)

    def __call__(self, rows: Rows, totals: Totals, weight: Tensor | None = None) -> Tensor:
        """The share of these rows in the loss of the global batch; shares add up to the loss.

        weight: of each row, [P], [S] or [G]; it multiplies the row's losses and its sft term.
        """
        loss = self._sft(rows, totals, weight)
        if isinstance(rows, GroupLogps) and weight is not None:
            weight = spread(weight, rows.counts, len(rows.logps))
        for spec, coefficient in zip(self.specs, self.coefficients(totals)):
            split = isinstance(rows, PairLogps) and not spec.paired
            values = spec.function(rows.sequences if split else rows, self.options)
            if weight is not None:
                values = values * (weight.repeat_interleave(2) if split else weight)
            loss = loss + coefficient * values.sum()
        return loss

    def _sft(self, rows: Rows, totals: Totals, weight: Tensor | None) -> Tensor | float:
        """The sft terms of losses that bring one along."""
        coefficient = self.sft_coefficient(totals)
        if coefficient == 0:
            return 0.0
        likelihood = rows.likelihood if weight is None else rows.likelihood * weight
        return -coefficient * likelihood.sum()

    @torch.no_grad()
    def watched(self, rows: Rows) -> dict[str, Tensor]:
        """Values whose means are plotted beside the loss, by name: what its losses have to show."""
        found = {}
        for spec in self.specs:
            found |= spec.watch(rows, self.options) if spec.watch else {}
        return found

    @torch.no_grad()
    def rewards(self, rows: Rows) -> Tensor:
        """Implicit rewards, beta * log-ratio, [S]: of pairs chosen and rejected in turn."""
        sequences = rows.sequences if isinstance(rows, PairLogps) else rows
        return self.options.beta * sequences.ratio.detach()
