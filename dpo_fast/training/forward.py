"""One micro-batch: what policy and reference say of it, and the loss of that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from dpo_fast.data.batch import ScoredBatch
from dpo_fast.losses import Objective, Preference, Totals, preference
from dpo_fast.losses.sums import needs_reference_tokens
from dpo_fast.models.scoring import forward_arguments
from dpo_fast.ops.preference import sum_sequences

EXTRAS = ("entropy", "mean_logit", "is_top1")  # what the metrics show of tokens


@dataclass(frozen=True)
class LossPass:
    """How the loss of a batch comes about. extras: of the head, for metrics; those that the objective
    needs are added. implementation: of `preference`."""

    objective: Objective = Objective()
    extras: tuple[str, ...] = ()
    implementation: str = "auto"

    def scores(self, engine, batch: ScoredBatch) -> dict[str, Tensor]:
        """The policy's log-probabilities and extras of every scored token, fp32 [T] each."""
        own = ("log_sum_p2",) if self.objective.options.use_weighting else ()
        return engine(**forward_arguments(batch), extras=(*self.extras, *own))

    def reference(self, reference, batch: ScoredBatch) -> dict[str, Tensor | None]:
        """The reference's, as arguments of `preference`: sums, and tokens where the options want them."""
        if not (self.objective.needs_reference and needs_reference_tokens(self.objective.options)):
            return {"reference_S": reference(batch)}
        return of_tokens(reference.token_logps(batch), batch)

    def loss(
        self, scores: Mapping[str, Tensor], reference: dict, batch: ScoredBatch, totals: Totals,
        statistics: Mapping[str, Tensor] | None = None,
    ) -> Preference:  # fmt: skip
        """Loss, log-probabilities and rewards of the batch."""
        used = {column for spec in self.objective.specs for column in spec.columns}
        return preference(
            scores["logp"], batch.lengths_S, objective=self.objective, totals=totals, **reference,
            log_sum_p2_T=scores.get("log_sum_p2"), statistics=statistics, good_S=batch.good_S,
            columns={name: value for name, value in batch.columns.items() if name in used},
            implementation=self.implementation,
        )  # fmt: skip


def of_tokens(logp_T: Tensor, batch: ScoredBatch) -> dict[str, Tensor]:
    """A reference given by its tokens."""
    return {"reference_S": sum_sequences(logp_T, batch.lengths_S), "reference_T": logp_T}
