"""From hidden states to a preference loss, in one module and without logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dpo_fast.losses import Preference, ScoredGroups, Totals, preference
from dpo_fast.modules.losses import (
    check_desirable,
    check_lengths,
    check_shapes,
    check_statistics,
    check_unpaired,
    check_whole,
)
from dpo_fast.modules.metrics import METRIC_EXTRAS, means, sequence_metrics, token_metrics
from dpo_fast.modules.objective import ObjectiveModule
from dpo_fast.modules.scored_rows import (
    ScoredRows,
    check_order,
    check_shift,
    masked_labels,
    pair_order,
    scored_rows,
    sequence_count,
)
from dpo_fast.ops.integers import as_int64
from dpo_fast.ops.linear_logp.call import HeadOptions
from dpo_fast.ops.linear_logp.dtensor import plain_input
from dpo_fast.ops.linear_logp.op import LinearLogp, linear_logp
from dpo_fast.ops.segments import sum_sequences


class FusedLinearPreferenceLoss(ObjectiveModule):
    """Any loss of the table, from hidden states and the weight of a language-model head.

    The weight is an argument of `forward`, so no hook gathers it. DTensors, as FSDP2 makes of weights, are
    gathered here (`linear_logp`). Under ZeRO-3 use a `FusedHead`, and give its sums to `PreferenceLoss`.

    Args:
        loss_type, loss_weights: a name of `dpo_fast.losses.LOSSES`, or several and their weights.
        batch_order: `concatenated`, all chosen sequences and then all rejected ones, as TRL and Liger
            have them; or `interleaved`, chosen and rejected in turn.
        ignore_index: labels that are not scored.
        shift: labels are the tokens themselves, as Hugging Face models take them, and position l - 1
            predicts labels[s, l]. By default they are shifted already: position l predicts labels[s, l].
        extras: of the head, for metrics: `entropy`, `mean_logit`, `is_top1`.
        logit_scale, softcap, temperature, implementation, workspace_bytes: as in `linear_logp`.
        options: fields of `LossOptions`, under TRL's names: beta, label_smoothing, ...

    Every argument is an attribute that may be set as well (`ObjectiveModule`).

    Raises:
        ValueError: naming the option, its value and what it must be.
    """

    def __init__(
        self,
        loss_type: str | Sequence[str] = "sigmoid",
        loss_weights: Sequence[float] | None = None,
        *,
        batch_order: str = "concatenated",
        ignore_index: int = -100,
        shift: bool = False,
        extras: tuple[str, ...] = (),
        logit_scale: float = 1.0,
        softcap: float | None = None,
        temperature: float = 1.0,
        implementation: str = "auto",
        workspace_bytes: int | None = None,
        **options,
    ) -> None:
        super().__init__(loss_type, loss_weights, options)
        check_order(batch_order)
        if unknown := [name for name in extras if name not in METRIC_EXTRAS]:
            raise ValueError(f"extras={unknown}: choose from {', '.join(METRIC_EXTRAS)}")
        self.batch_order, self.ignore_index, self.shift = batch_order, ignore_index, shift
        self.extras = tuple(extras)
        HeadOptions(logit_scale, softcap, temperature)  # it refuses what cannot be
        self.logit_scale, self.softcap, self.temperature = logit_scale, softcap, temperature
        self.implementation, self.workspace_bytes = implementation, workspace_bytes

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        bias: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        sequence_ids: Tensor | None = None,
        mask: Tensor | None = None,
        input_ids: Tensor | None = None,
        desirable: Tensor | None = None,
        scores: Tensor | None = None,
        counts: Tensor | None = None,
        old_logps: Tensor | None = None,
        reference_logps: Tensor | None = None,
        reference_hidden: Tensor | None = None,
        reference_weight: Tensor | None = None,
        reference_bias: Tensor | None = None,
        columns: Mapping[str, Tensor] | None = None,
        statistics: Mapping[str, Tensor] | None = None,
        totals: Totals | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss, [] fp32, and metrics, detached: `sequence_metrics`, and `token_metrics` of the extras.

        Args:
            hidden: [S, L, D], or packed [N, D].
            weight: [V, D]; may be a DTensor, as in `linear_logp`.
            labels: integers of any dtype [S, L], or packed [N] with one of
            lengths: integers [S], packed rows of each sequence;
            sequence_ids: integers [N], the sequence of each packed row, counted from 0, in any order.
            bias: [V] or None.
            mask: bool, shaped as labels: which of them are scored; by default all but `ignore_index`.
            input_ids: the tokens that the hidden states are of, shaped as labels. With them labels that are
                not shifted as `shift` says are noticed; nothing else is done with them.
            desirable: bool [S]. With it sequences are desirable or undesirable by themselves, in any
                order, not pairs.
            scores: fp32 [S], higher is better, and
            counts: integers [P]. With them sequences are P groups of so many completions, one after
                the other.
            old_logps: fp32, shaped as labels: log-probs under the model that wrote the completions
                (grpo, dapo).
            reference_logps: fp32 [S], in the order of the batch. Or, to be scored here without gradients,
            reference_hidden, reference_weight, reference_bias: as the policy's; the hidden size may differ.
            columns, statistics, totals: as in `PreferenceLoss`.

        Raises:
            ValueError: an input is missing, is not used, or does not fit the others.
        """
        columns, statistics = columns or {}, statistics or {}
        self.objective.check_inputs(columns, statistics)
        check_statistics(statistics)
        labels = plain_input(labels, "labels")
        if mask is not None:
            labels = masked_labels(labels, mask, self.ignore_index)
        if input_ids is not None:
            check_shift(labels, input_ids, self.shift, self.ignore_index)
        S = sequence_count(labels, lengths, sequence_ids)
        grouped = any(each is not None for each in (scores, counts, old_logps))
        if grouped and desirable is not None:
            raise ValueError("give desirable, or scores and counts, not both")
        order_S = None if grouped else self._order(desirable, S, labels.device)
        rows = scored_rows(
            labels,
            lengths,
            sequence_ids_N=sequence_ids,
            order_S=order_S,
            ignore_index=self.ignore_index,
            shift=self.shift,
        )
        groups = self._groups(scores, counts, old_logps, labels, rows) if grouped else None
        self._check_batch(rows, desirable, groups, columns, totals)
        extras = self.extras
        if self.objective.options.use_weighting:
            extras += ("log_sum_p2",)
        found = self._score(hidden, weight, bias, labels, rows, extras)
        head = reference_hidden, reference_weight, reference_bias
        reference_S, reference_T = self._reference(reference_logps, head, labels, rows, order_S)
        result = preference(
            found.logp,
            rows.lengths_S,
            reference_S,
            self.objective,
            self._totals(rows.lengths_S, desirable, groups) if totals is None else totals,
            reference_T=reference_T,
            log_sum_p2_T=found.log_sum_p2,
            columns=columns,
            desirable_S=desirable,
            groups=groups,
            statistics=statistics,
            implementation=self._loss_implementation,
        )
        return result.loss, self._metrics(result, found, rows.lengths_S, desirable, groups)

    def _metrics(self, result: Preference, found: LinearLogp, lengths_S, desirable, groups):
        asked = {name: getattr(found, name) for name in self.extras}
        metrics = sequence_metrics(result.logps_S, result.rewards_S, desirable, groups)
        metrics |= token_metrics(asked, lengths_S, desirable, groups)
        return means(metrics) | {name: values.mean() for name, values in result.watched.items()}

    @property
    def _loss_implementation(self) -> str:
        """`torch` if the head is; else `auto`, since the kernel of the loss computes some losses only."""
        return "torch" if self.implementation == "torch" else "auto"

    def _order(self, desirable: Tensor | None, S: int, device: torch.device) -> Tensor | None:
        if desirable is None:
            return pair_order(S, self.batch_order, device)
        check_unpaired(self.objective)
        check_desirable(desirable, S)
        return None

    def _groups(self, scores, counts, old_logps, labels: Tensor, rows: ScoredRows) -> ScoredGroups:
        """The groups, with the scored tokens' log-probs under the model that wrote them."""
        if scores is None or counts is None:
            raise ValueError("scores and counts belong together; give both")
        counts = as_int64(counts, "counts")
        if old_logps is None:
            return ScoredGroups(scores, counts)
        if old_logps.shape != labels.shape:
            raise ValueError(
                f"old_logps is {tuple(old_logps.shape)}, labels are {tuple(labels.shape)}; expected one "
                "log-prob for each label"
            )
        if not self.objective.needs_old_tokens:
            raise ValueError(f"losses {self.objective.names} do not use old_logps; leave them out")
        return ScoredGroups(scores, counts, old_logps.flatten()[rows.labels_T].detach().float())

    def _check_batch(self, rows: ScoredRows, desirable, groups, columns, totals) -> None:
        """Raises ValueError for lengths, totals or columns that do not fit the batch."""
        S = len(rows.lengths_S)
        check_lengths(self.objective, rows.lengths_S)
        if totals is not None:
            check_whole(self.objective, totals, S // 2)
        P = len(groups.counts_P) if groups is not None else S if desirable is not None else S // 2
        check_shapes([*columns.values(), torch.empty(P)])

    def _score(
        self, hidden, weight, bias, labels: Tensor, rows: ScoredRows, extras: tuple = ()
    ) -> LinearLogp:
        hidden = plain_input(hidden, "hidden")
        if hidden.shape[:-1] != labels.shape:
            raise ValueError(
                f"hidden is {tuple(hidden.shape)}, labels are {tuple(labels.shape)}; expected a row of "
                "hidden states for each label"
            )
        return linear_logp(
            hidden.flatten(0, -2)[rows.rows_T],
            weight,
            rows.targets_T,
            bias=bias,
            logit_scale=self.logit_scale,
            softcap=self.softcap,
            temperature=self.temperature,
            extras=extras,
            implementation=self.implementation,
            workspace_bytes=self.workspace_bytes,
        )

    def _reference(self, logps_S, head: tuple, labels, rows: ScoredRows, order_S):
        """The reference's sums, [S], and tokens, [T], in the order of `rows`; each may be None."""
        hidden, weight, bias = head
        scored = hidden is not None or weight is not None
        self._check_reference(logps_S, scored)
        if bias is not None and not scored:
            raise ValueError(
                "reference_bias belongs to reference_hidden and reference_weight; leave it out"
            )
        if scored:
            if hidden is None or weight is None:
                raise ValueError("reference_hidden and reference_weight belong together")
            with torch.no_grad():
                logp_T = self._score(*head, labels, rows).logp
            tokens_T = logp_T if self.objective.needs_reference_tokens else None
            return sum_sequences(logp_T, rows.lengths_S), tokens_T
        if logps_S is None:
            return None, None
        if self.objective.needs_reference_tokens:
            raise ValueError(
                "ld_alpha, token_clamp and grpo_beta need the reference's log-prob of every token: give "
                "reference_hidden and reference_weight instead of reference_logps"
            )
        check_shapes([logps_S, rows.lengths_S])
        return (logps_S if order_S is None else logps_S[order_S]).detach().float(), None

    def _check_reference(self, logps_S: Tensor | None, scored: bool) -> None:
        given = logps_S is not None or scored
        if logps_S is not None and scored:
            raise ValueError("give reference_logps or reference_hidden, not both")
        if given and self.objective.options.reference_free:
            raise ValueError("reference_free=True uses no reference; leave it out")
        if not given and self.objective.needs_reference:
            raise ValueError(
                f"losses {self.objective.names} need a reference: give reference_logps, or "
                "reference_hidden and reference_weight"
            )

    def _totals(
        self, lengths_S: Tensor, desirable: Tensor | None, groups: ScoredGroups | None
    ) -> Totals:
        S = len(lengths_S)
        if groups is not None:
            return Totals(len(groups.counts_P), 0, S, int(lengths_S.sum()))
        divides, tokens = self.objective.divides_by_chosen_tokens, 0
        if desirable is not None:
            tokens = max(int(lengths_S[desirable].sum()), 1) if divides else 0
            return Totals(0, tokens, S)
        tokens = int(lengths_S[0::2].sum()) if divides else 0
        return Totals(S // 2, tokens, S)

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, batch_order={self.batch_order!r}, "
            f"logit_scale={self.logit_scale}, softcap={self.softcap}, temperature={self.temperature}"
        )
