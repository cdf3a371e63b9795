"""A weighted sum of losses, normalised over the whole global batch."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from dpo_fast.losses.custom import all_specs, known_names, spec_of
from dpo_fast.losses.logps import GroupLogps, Logps, PairLogps, spread
from dpo_fast.losses.options import LossOptions
from dpo_fast.losses.spec import SHARED, LossSpec
from dpo_fast.losses.table import LOSSES

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Totals:
    """Counts over the global batch: every micro-batch of every rank.

    The loss is divided by them, so it and its gradient do not depend on how the batch is split.

    pairs: pairs, or groups.
    chosen_tokens: scored tokens of chosen completions, for sft terms.
    sequences: by default two for each pair.
    tokens: scored tokens of all sequences, for losses that are means over tokens.
    """

    pairs: int
    chosen_tokens: int
    sequences: int | None = None
    tokens: int = 0

    def __post_init__(self) -> None:
        if self.sequences is None:
            object.__setattr__(self, "sequences", 2 * self.pairs)


@dataclass(frozen=True)
class Objective:
    """sum_k weight_k * (sum over examples of loss_k) / total_k, and the sft terms that losses bring along.

    Raises:
        ValueError: an unknown name; weights that do not fit the names; an option that is changed and not
            used by any loss; an option that a loss needs and that is at its default.
    """

    names: tuple[str, ...] = ("sigmoid",)
    weights: tuple[float, ...] = (1.0,)
    options: LossOptions = LossOptions()

    def __post_init__(self) -> None:
        unknown = [name for name in self.names if spec_of(name) is None]
        if unknown or not self.names:
            raise ValueError(f"loss {unknown} is not known; choose from {', '.join(known_names())}")
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
                f"{', '.join(groups)} needs groups of scored completions and {', '.join(others)} does "
                "not: no data serves both; choose losses of one kind"
            )

    def _check_options(self) -> None:
        """Refuse an option that no loss uses, and one for all losses that one of them does not use."""
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
                # A shared option concerns all losses but sft, which sees the plain sums.
                idle = [name for name in idle if option in SHARED and name != "sft"]
            if idle:
                takers = [name for name, spec in LOSSES.items() if option in spec.options]
                raise ValueError(
                    f"loss.{option}={getattr(self.options, option)} is not used by {', '.join(idle)}; "
                    f"remove it, or choose {' or '.join(takers)}"
                )

    def _check_coupled(self) -> None:
        """Refuse what does not go with a coupled loss: columns of single pairs, sums in two forms."""
        if not self.coupled:
            return
        first = next(spec.name for spec in self.specs if spec.coupled)
        columns = [spec.name for spec in self.specs if spec.needs_columns]
        if columns:
            raise ValueError(
                f"{', '.join(columns)} needs columns of the data, beside which {first} is not defined"
            )
        if self.options.changes_sums and (
            "sft" in self.names or self.sft_coefficient(Totals(1, 1))
        ):
            raise ValueError(
                f"loss.ld_alpha and loss.token_clamp change the sums that {first} sorts, and an sft term "
                "needs them as they are; leave out one of the two"
            )

    def __getstate__(self) -> dict:
        """Names and options alone: specs hold functions that pickle cannot name."""
        return {name: value for name, value in vars(self).items() if name != "specs"}

    @cached_property
    def specs(self) -> tuple[LossSpec, ...]:
        """Those of the names at first use: a file that is changed later changes no objective."""
        return all_specs(self.names)

    @property
    def needs_reference(self) -> bool:
        compares = any(spec.compares(self.options) for spec in self.specs)
        return compares and not self.options.reference_free

    @property
    def needs_reference_tokens(self) -> bool:
        """Whether sums of the reference are not enough."""
        by_token = any(spec.by_token and spec.compares(self.options) for spec in self.specs)
        return self.needs_reference and (by_token or self.options.needs_reference_tokens)

    @property
    def needs_old_tokens(self) -> bool:
        """Whether it needs log-probs under the model that wrote the completions."""
        return any(spec.by_token for spec in self.specs)

    @property
    def paired(self) -> bool:
        """Whether some loss needs pairs. Without one, completions may come one by one."""
        return any(spec.paired and not spec.single for spec in self.specs)

    @property
    def learns(self) -> bool:
        """Whether it takes demonstrations: answers with nothing that says how good they are."""
        return all(spec.single for spec in self.specs)

    @property
    def grouped(self) -> bool:
        """Whether it takes groups of scored completions."""
        return any(spec.grouped for spec in self.specs)

    @property
    def coupled(self) -> bool:
        return any(spec.coupled for spec in self.specs)

    @property
    def columns(self) -> frozenset[str]:
        """Columns of the data that some loss uses; none beside a coupled loss."""
        used = {column for spec in self.specs for column in spec.columns}
        return frozenset() if self.coupled else frozenset(used)

    @property
    def needed_columns(self) -> frozenset[str]:
        """Columns of the data that some loss needs."""
        return frozenset(column for spec in self.specs for column in spec.needs_columns)

    def check_inputs(self, columns: Iterable[str], statistics: Iterable[str] = ()) -> None:
        """Raises ValueError for a column or statistic without use, or a needed column that is missing."""
        if unused := [column for column in columns if column not in self.columns]:
            why = ", as pairs are sorted over the batch" if self.coupled else ""
            raise ValueError(
                f"losses {self.names} do not use the columns {unused}{why}; leave them out"
            )
        if missing := sorted(self.needed_columns - set(columns)):
            raise ValueError(f"losses {self.names} need the columns {missing}")
        if unused := sorted(set(statistics) - set(self.statistics)):
            raise ValueError(f"losses {self.names} do not use the statistics {unused}")

    def check_single(self, instead: str) -> None:
        """Raises ValueError for what needs pairs. instead: what there is, in words."""
        names = [spec.name for spec in self.specs if spec.paired and not spec.single]
        if names:
            raise ValueError(f"losses {names} compare the answers of pairs; {instead}")
        if self.options.use_weighting:
            raise ValueError(f"loss.use_weighting=true weighs pairs by both answers; {instead}")

    def check_totals(self, totals: Totals, *, pairs: int, sequences: int, tokens: int) -> None:
        """Raises ValueError for a total below the count of these examples alone.

        A count left at 0 would make a mean a sum. tokens: scored ones, of all sequences.
        """
        for spec in self.specs:
            here = {"pairs": pairs, "sequences": sequences, "tokens": tokens}.get(
                spec.normaliser, 0
            )
            count = getattr(totals, spec.normaliser)
            if here > count:
                raise ValueError(
                    f"totals.{spec.normaliser}={count}: {spec.name} divides by it, and this batch alone "
                    f"has {here}; give the count of the global batch"
                )
        divides = self.divides_by_chosen_tokens and (pairs or self.learns)
        if tokens and divides and totals.chosen_tokens <= 0:
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
        """`kl`, `delta`: what the trainer estimates over all ranks."""
        return tuple(sorted({name for spec in self.specs for name in spec.statistics}))

    def coefficients(self, totals: Totals) -> tuple[float, ...]:
        """weight_k / total_k: the factor of each loss's sum over examples."""
        return tuple(
            weight / max(getattr(totals, spec.normaliser), 1)
            for spec, weight in zip(self.specs, self.weights)
        )

    def sft_coefficient(self, totals: Totals) -> float:
        """The factor of minus the sum of chosen log-probs, for losses that bring an sft term."""
        weight = sum(w * spec.sft(self.options) for spec, w in zip(self.specs, self.weights))
        return weight / max(totals.chosen_tokens, 1)

    def __call__(self, logps: Logps, totals: Totals, weight: Tensor | None = None) -> Tensor:
        """The share of these examples in the loss of the global batch; shares add up to the loss.

        weight: of each example, [P], or [S] of completions; multiplies its losses and its sft term.
        """
        loss: Tensor | float = self._sft(logps, totals, weight)
        if isinstance(logps, GroupLogps) and weight is not None:
            weight = spread(weight, logps.counts, len(logps.logps))
        for spec, coefficient in zip(self.specs, self.coefficients(totals)):
            seen: Logps = logps
            own = weight
            if isinstance(logps, PairLogps) and not spec.paired:
                seen, own = logps.sequences, None if weight is None else weight.repeat_interleave(2)
            values = spec.function(seen, self.options)
            values = values if own is None else values * own
            loss = loss + coefficient * values.sum()
        assert isinstance(loss, torch.Tensor)  # there is a loss at least
        return loss

    def _sft(self, logps: Logps, totals: Totals, weight: Tensor | None) -> Tensor | float:
        """The sft terms of losses that bring one along."""
        coefficient = self.sft_coefficient(totals)
        if coefficient == 0:
            return 0.0
        assert not isinstance(logps, GroupLogps)  # their losses bring none
        likelihood = logps.likelihood if weight is None else logps.likelihood * weight
        return -coefficient * likelihood.sum()

    def watched(self, logps: Logps) -> dict[str, Tensor]:
        """Values whose means are plotted beside the loss, by name. Without gradients."""
        found: dict[str, Tensor] = {}
        with torch.no_grad():
            for spec in self.specs:
                found |= spec.watch(logps, self.options) if spec.watch else {}
        return found

    @property
    def averages(self) -> bool:
        """Whether rewards are means over tokens: every loss but sft divides by a completion's length.

        Otherwise an answer could have the higher reward, and the loss prefer the other.
        """
        judges = [spec for spec in self.specs if spec.name != "sft"]
        return bool(judges) and all(spec.divides(self.options) for spec in judges)

    def rewards(self, logps: Logps) -> Tensor:
        """Implicit rewards, [S]; of pairs chosen and rejected in turn.

        beta * log-ratio, of sums or, where the objective `averages`, of means over tokens; without a
        reference beta * log-probability. sft alone compares nothing, and its rewards are of sums.
        """
        sequences = logps.sequences if isinstance(logps, PairLogps) else logps
        rewards_S = self.options.beta * sequences.ratio.detach()
        return self.scaled(rewards_S, sequences.lengths)

    def scaled(self, rewards_S: Tensor, lengths_S: Tensor) -> Tensor:
        """Rewards of sums, as the losses of the objective see them, [S]."""
        return rewards_S / lengths_S.clamp_min(1) if self.averages else rewards_S
