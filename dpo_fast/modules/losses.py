"""Preference losses as modules, for log-probabilities of completions that exist already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dpo_fast.losses import Objective, PairLogps, SequenceLogps, Totals
from dpo_fast.modules.metrics import means, sequence_metrics
from dpo_fast.modules.objective import ObjectiveModule

TOKEN_OPTIONS = ("ld_alpha", "token_clamp", "use_weighting")


class _SequenceLoss(ObjectiveModule):
    """An objective on sums of log-probabilities, without their tokens."""

    def __init__(
        self,
        loss_type: str | Sequence[str] = "sigmoid",
        loss_weights: Sequence[float] | None = None,
        **options,
    ) -> None:
        super().__init__(loss_type, loss_weights, options)

    def check_objective(self, objective: Objective) -> None:
        if objective.grouped:
            raise ValueError(
                f"losses {objective.names} take groups of scored completions: use "
                "FusedLinearPreferenceLoss, or dpo_fast.losses.preference"
            )
        for name in TOKEN_OPTIONS:
            if name in objective.options.changed:
                raise ValueError(
                    f"{name}={getattr(objective.options, name)} acts on tokens, and here are "
                    "only their sums: use FusedLinearPreferenceLoss"
                )

    def _check_reference(self, reference: Tensor | None) -> None:
        if reference is None and self.objective.needs_reference:
            raise ValueError(
                f"losses {self.objective.names} need the reference's log-probabilities; give them, or "
                "set reference_free=True"
            )
        if reference is not None and self.objective.options.reference_free:
            raise ValueError("reference_free=True uses no reference; leave its log-probs out")


class PreferenceLoss(_SequenceLoss):
    """Any loss of the table on pairs.

    Args:
        loss_type, loss_weights: a name of `dpo_fast.losses.LOSSES`, or several and their weights.
        options: fields of `LossOptions`, under TRL's names: beta, label_smoothing, ...

    Raises:
        ValueError: an option that no loss uses, or that acts on tokens.
    """

    def forward(
        self,
        chosen_logps: Tensor,
        rejected_logps: Tensor,
        reference_chosen_logps: Tensor | None = None,
        reference_rejected_logps: Tensor | None = None,
        *,
        chosen_lengths: Tensor | None = None,
        rejected_lengths: Tensor | None = None,
        columns: Mapping[str, Tensor] | None = None,
        statistics: Mapping[str, Tensor] | None = None,
        totals: Totals | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss, [], and metrics, detached.

        Args:
            chosen_logps, rejected_logps: sums over a completion's tokens, [P].
            reference_chosen_logps, reference_rejected_logps: the same under the reference.
            chosen_lengths, rejected_lengths: scored tokens, [P], for losses that divide by them.
            columns: `weight`, `margin`, `soft_label` of the data, [P] each, where a loss uses them.
            statistics: `kl`, `delta`, [] each, where a loss uses them; 0 if missing.
            totals: counts of the global batch that these pairs are a part of. The losses of its parts
                add up to its loss, so gradients over micro-batches are exact. Default: these pairs alone.

        Raises:
            ValueError: an input is missing, is not used, or does not fit the others.
        """
        objective, columns, statistics = self.objective, columns or {}, statistics or {}
        objective.check_inputs(columns, statistics)
        check_statistics(statistics)
        if (reference_chosen_logps is None) != (reference_rejected_logps is None):
            raise ValueError("give reference log-probs of chosen and of rejected, or of neither")
        self._check_reference(reference_chosen_logps)
        sides = (chosen_logps, rejected_logps, reference_chosen_logps, reference_rejected_logps)
        check_shapes((*sides, chosen_lengths, rejected_lengths, *columns.values()))
        self._check_lengths(chosen_lengths, rejected_lengths, totals)
        pairs = PairLogps(
            chosen_logps,
            rejected_logps,
            chosen_lengths,
            rejected_lengths,
            reference_chosen_logps,
            reference_rejected_logps,
            columns.get("margin"),
            columns.get("soft_label"),
            statistics.get("delta"),
            statistics.get("kl"),
        )
        if totals is None:
            tokens = int(chosen_lengths.sum()) if objective.divides_by_chosen_tokens else 0
            totals = Totals(len(chosen_logps), tokens, 2 * len(chosen_logps))
        P = len(chosen_logps)
        check_whole(objective, totals, P)
        objective.check_totals(totals, pairs=P, sequences=2 * P, tokens=P)
        loss = objective(pairs, totals, columns.get("weight"))
        metrics = means(sequence_metrics(pairs.sequences.logps, objective.rewards(pairs)))
        return loss, metrics | {x: v.mean() for x, v in objective.watched(pairs).items()}

    def _check_lengths(self, chosen_lengths, rejected_lengths, totals: Totals | None) -> None:
        if (chosen_lengths is None) != (rejected_lengths is None):
            raise ValueError("give chosen_lengths and rejected_lengths, or neither")
        options = self.objective.options
        means = [spec.name for spec in self.objective.specs if spec.divides(options)]
        if means and chosen_lengths is not None:
            check_lengths(self.objective, torch.stack([chosen_lengths, rejected_lengths]))
        elif means:
            raise ValueError(f"losses {means} divide by lengths: give those of chosen and rejected")
        if chosen_lengths is None and totals is None and self.objective.divides_by_chosen_tokens:
            raise ValueError(
                f"losses {self.objective.names} divide by the number of chosen tokens: give "
                "lengths, or totals"
            )


class UnpairedPreferenceLoss(_SequenceLoss):
    """Losses on completions that are desirable or undesirable by themselves: kto, bco, apo_zero_unpaired.

    Arguments as for `PreferenceLoss`.
    """

    def __init__(
        self,
        loss_type: str | Sequence[str] = "kto",
        loss_weights: Sequence[float] | None = None,
        **options,
    ) -> None:
        super().__init__(loss_type, loss_weights, **options)

    def check_objective(self, objective: Objective) -> None:
        super().check_objective(objective)
        check_unpaired(objective)

    def forward(
        self,
        logps: Tensor,
        desirable: Tensor,
        reference_logps: Tensor | None = None,
        *,
        columns: Mapping[str, Tensor] | None = None,
        statistics: Mapping[str, Tensor] | None = None,
        totals: Totals | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss, [], and metrics, detached: means over desirable and over undesirable completions.

        A mean over no completion is nan.

        Args:
            logps, reference_logps: sums over a completion's tokens, [S].
            desirable: bool [S].
            columns, statistics, totals: as in `PreferenceLoss`; `weight` is [S].

        Raises:
            ValueError: an input is missing, is not used, or does not fit the others.
        """
        columns, statistics = columns or {}, statistics or {}
        self.objective.check_inputs(columns, statistics)
        check_statistics(statistics)
        self._check_reference(reference_logps)
        check_desirable(desirable, len(logps))
        check_shapes((logps, reference_logps, *columns.values()))
        sequences = SequenceLogps(
            logps, None, desirable, reference_logps, statistics.get("kl"), statistics.get("delta")
        )
        if totals is None and self.objective.divides_by_chosen_tokens:
            raise ValueError(
                f"losses {self.objective.names} divide by the number of desirable tokens: give totals"
            )
        totals = Totals(0, 0, len(logps)) if totals is None else totals
        self.objective.check_totals(totals, pairs=0, sequences=len(logps), tokens=0)
        loss = self.objective(sequences, totals, columns.get("weight"))
        return loss, means(sequence_metrics(logps, self.objective.rewards(sequences), desirable))


def check_unpaired(objective: Objective) -> None:
    """Raises ValueError for a loss that needs pairs."""
    objective.check_single("these are not pairs")


def check_whole(objective: Objective, totals: Totals, pairs: int) -> None:
    """Raises ValueError for a coupled loss on a part of the global batch: parts would not add up."""
    if objective.coupled and totals.pairs != pairs:
        raise ValueError(
            f"totals.pairs={totals.pairs}, and there are {pairs}: losses {objective.names} sort the pairs "
            "of the global batch, so its parts have no losses of their own; give it whole"
        )


def check_lengths(objective: Objective, lengths: Tensor) -> None:
    """Raises ValueError for a sequence without scored tokens if a loss divides by lengths."""
    means = [spec.name for spec in objective.specs if spec.divides(objective.options)]
    if means and not torch.compiler.is_compiling() and (lengths <= 0).any():
        raise ValueError(
            f"losses {means} divide by lengths, and a sequence has no scored token: leave the pair out"
        )


def check_statistics(statistics: Mapping[str, Tensor]) -> None:
    """Raises ValueError unless each is one number: values of single pairs would not follow their order."""
    for name, value in statistics.items():
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(
                f"statistics[{name!r}] is {tuple(value.shape)}; expected one number, []"
            )


def check_desirable(desirable: Tensor, S: int, name: str = "desirable") -> None:
    """Raises ValueError unless it is bool [S]."""
    if desirable.dtype != torch.bool or desirable.shape != (S,):
        raise ValueError(
            f"{name} is {desirable.dtype} {tuple(desirable.shape)}; expected torch.bool ({S},), true "
            "for desirable completions"
        )


def check_shapes(vectors: Sequence[Tensor | None]) -> None:
    """Raises ValueError unless all have one length: broadcasting would mix pairs."""
    shapes = {tuple(x.shape) for x in vectors if x is not None}
    if len(shapes) > 1 or any(len(shape) != 1 for shape in shapes):
        raise ValueError(f"expected vectors of one length; got shapes {sorted(shapes)}")
