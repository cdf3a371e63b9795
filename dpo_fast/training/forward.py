"""One micro-batch: what policy and reference say of it, and the loss of that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from dpo_fast.data.batch import ScoredBatch
from dpo_fast.losses import Objective, Preference, ScoredGroups, Totals, preference
from dpo_fast.losses.preference import UNPAIRED, kernel_misses
from dpo_fast.models.scoring import forward_arguments
from dpo_fast.ops.preference import sum_sequences
from dpo_fast.references import CachedReference

EXTRAS = ("entropy", "mean_logit", "is_top1")  # what the metrics show of tokens


@dataclass(frozen=True)
class LossPass:
    """How the loss of a batch comes about. extras: of the head, for metrics; those that the objective
    needs are added. implementation: of the head, and of the loss where its kernel computes all that is
    asked. old: a reference that holds the log-probs that completions were written with, where the
    objective needs those."""

    objective: Objective = Objective()
    extras: tuple[str, ...] = ()
    implementation: str = "auto"
    old: CachedReference | None = None

    def token_outputs(self, engine, batch: ScoredBatch) -> dict[str, Tensor]:
        """The policy's log-probabilities and extras of every scored token, fp32 [T] each."""
        own = ("log_sum_p2",) if self.objective.options.use_weighting else ()
        return engine(**forward_arguments(batch), extras=(*self.extras, *own))

    def reference(self, provider, batch: ScoredBatch) -> dict[str, Tensor | None]:
        """What the policy is compared with, for `loss`: the reference's sums, and its tokens where the
        losses want them; `old_T` where they want what the completions were written with."""
        old = {"old_T": self.old.token_logps(batch)} if self.objective.needs_old_tokens else {}
        if not self.objective.needs_reference_tokens:
            return {"reference_S": provider(batch)} | old
        return of_tokens(provider.token_logps(batch), batch) | old

    def loss(
        self,
        token_outputs: Mapping[str, Tensor],
        reference: dict,
        batch: ScoredBatch,
        totals: Totals,
        statistics: Mapping[str, Tensor] | None = None,
    ) -> Preference:
        """Loss, log-probabilities and rewards of the batch."""
        used = self.objective.columns
        reference, groups = dict(reference), None
        old_T = reference.pop("old_T", None)
        if batch.scores_S is not None:
            groups = ScoredGroups(batch.scores_S, batch.counts_P, old_T)
        return preference(
            token_outputs["logp"],
            batch.lengths_S,
            objective=self.objective,
            totals=totals,
            **reference,
            groups=groups,
            log_sum_p2_T=token_outputs.get("log_sum_p2"),
            statistics=statistics,
            desirable_S=batch.desirable_S,
            columns={name: value for name, value in batch.columns.items() if name in used},
            implementation=self._of_loss(batch),
        )

    def _of_loss(self, batch: ScoredBatch) -> str:
        if self.implementation == "torch":
            return "torch"
        extra = [name for name in batch.columns if name in self.objective.columns]
        extra += [] if batch.desirable_S is None and batch.scores_S is None else [UNPAIRED]
        fused = self.implementation == "triton" and not kernel_misses(self.objective, extra)
        return "triton" if fused else "auto"  # which says in the log what it takes, and why


def of_tokens(logp_T: Tensor, batch: ScoredBatch) -> dict[str, Tensor]:
    """A reference given by its tokens."""
    return {"reference_S": sum_sequences(logp_T, batch.lengths_S), "reference_T": logp_T}
