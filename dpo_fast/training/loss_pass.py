"""The loss of a micro-batch: policy and reference score it, and the losses compare them.

KTO and BCO need statistics of more than the micro-batch. They do not depend on how a global batch is split
into micro-batches, accumulation steps or ranks:

kl     max(0, mean log-ratio of policy to reference of mismatched completions), over the global batch, with
       the weights before the step
delta  mean reward of all sequences of all earlier steps, 0 in the first step. (TRL's includes the present
       micro-batch, so it depends on how a batch is split.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dpo_fast.data.batch import ScoredBatch
from dpo_fast.losses import Objective, Preference, ScoredGroups, Totals, preference
from dpo_fast.losses.from_tokens import UNPAIRED, kernel_misses
from dpo_fast.losses.sums import Tokens, sequence_sums
from dpo_fast.models.scoring import forward_arguments
from dpo_fast.ops.segments import sum_sequences
from dpo_fast.references import CachedReference
from dpo_fast.training.balance import Routing
from dpo_fast.training.data_ranks import sum_once


@dataclass(frozen=True)
class LossPass:
    """How the loss of a batch is computed.

    objective: the weighted losses.
    extras: extras of the head for metrics; those that the objective needs are added.
    implementation: of the head, and of the loss if its kernel can do all that is asked.
    old: log-probabilities under the model that wrote the completions, where the objective needs them.
    routing: what is asked of the model's routers of experts; None where it has none.
    """

    objective: Objective = Objective()
    extras: tuple[str, ...] = ()
    implementation: str = "auto"
    old: CachedReference | None = None
    routing: Routing | None = None

    def token_outputs(self, engine, batch: ScoredBatch) -> dict[str, Tensor]:
        """The policy's log-probability (`logp`) and extras of every scored token, fp32 [T] each.

        Of a mixture of experts also the sums of its routers (`Heard.outputs`).
        """
        own = ("log_sum_p2",) if self.objective.options.use_weighting else ()
        heard = {} if self.routing is None else self.routing.heard(batch)
        return engine(**forward_arguments(batch), extras=(*self.extras, *own), **heard)

    def reference(self, provider, batch: ScoredBatch) -> dict[str, Tensor | None]:
        """What the policy is compared with, as `loss` takes it, fp32.

        reference_S: the reference's log-probability of each sequence, or None.
        reference_T: that of each token, where the objective needs tokens.
        old_T: that of each token under the model that wrote it, where the objective needs it.
        """
        old = {"old_T": self.old.token_logps(batch)} if self.objective.needs_old_tokens else {}
        if not self.objective.needs_reference_tokens:
            return {"reference_S": provider(batch)} | old
        return token_reference(provider.token_logps(batch), batch) | old

    def loss(
        self,
        token_outputs: Mapping[str, Tensor],
        reference: dict,
        batch: ScoredBatch,
        totals: Totals,
        statistics: Mapping[str, Tensor] | None = None,
    ) -> Preference:
        """Loss, log-probabilities and rewards of the batch.

        token_outputs, reference: what the methods of these names return.
        totals: counts of the global batch; the loss is the batch's share in it.
        statistics: `kl` and `delta`, [] each; 0 where missing.
        """
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
            implementation=self._loss_implementation(batch),
        )

    def _loss_implementation(self, batch: ScoredBatch) -> str:
        if self.implementation == "torch":
            return "torch"
        extra = [name for name in batch.columns if name in self.objective.columns]
        extra += [] if batch.desirable_S is None and batch.scores_S is None else [UNPAIRED]
        fused = self.implementation == "triton" and not kernel_misses(self.objective, extra)
        return "triton" if fused else "auto"  # auto logs what it takes, and why


def token_reference(logp_T: Tensor, batch: ScoredBatch) -> dict[str, Tensor]:
    """A reference from its log-probabilities of tokens, as `LossPass.reference` gives it."""
    return {"reference_S": sum_sequences(logp_T, batch.lengths_S), "reference_T": logp_T}


class Statistics:
    """The statistics that an objective names, over the steps of a run.

    values: those of the present step, [] fp32 each, by name.
    """

    def __init__(self, names: tuple[str, ...], device: torch.device | str = "cpu") -> None:
        self.names = names
        self.values: dict[str, Tensor] = {}
        # Sum and count of rewards: of all ranks in earlier steps, and of this rank in the present one.
        self.rewards = torch.zeros(2, dtype=torch.float64, device=device)
        self._step = torch.zeros_like(self.rewards)

    def estimate(
        self, engine, mismatched: Iterable[ScoredBatch], loss_pass: LossPass, provider
    ) -> dict[str, Tensor]:
        """The values for a set of examples, [] fp32 each. Collective.

        mismatched: this rank's share of the examples with mismatched completions.
        """
        values = {}
        if "kl" in self.names:
            values["kl"] = estimate_kl(engine, mismatched, loss_pass, provider)
        if "delta" in self.names:
            total, count = self.rewards
            values["delta"] = (total / count.clamp_min(1)).float()
        return values

    def begin_step(
        self, engine, mismatched: Iterable[ScoredBatch], loss_pass: LossPass, provider
    ) -> None:
        """Estimate `values` before the first forward of a step. Collective."""
        self.values = self.estimate(engine, mismatched, loss_pass, provider)

    @torch.no_grad()
    def add(self, rewards_S: Tensor) -> None:
        """Add the rewards of a micro-batch of the present step."""
        if "delta" not in self.names:
            return
        self._step[0] += rewards_S.double().sum()
        self._step[1] += rewards_S.numel()

    def end_step(self) -> None:
        """Make the present step one of the earlier ones. Collective."""
        if "delta" in self.names:
            rewards = sum_once(self._step)
            # A step that was not taken has none that can be counted.
            self.rewards += rewards.where(rewards.isfinite().all(), torch.zeros_like(rewards))
        self._step = torch.zeros_like(self.rewards)

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint between two steps must hold."""
        return {"rewards": self.rewards}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.rewards = state["rewards"].to(self.rewards.device)


@torch.no_grad()
def estimate_kl(engine, mismatched: Iterable[ScoredBatch], loss_pass: LossPass, provider) -> Tensor:
    """max(0, mean log-ratio of mismatched completions over all ranks), [] fp32. Collective.

    The log-ratio is that of the loss, so token_clamp and reference_free change it too.

    mismatched: this rank's batches, as many as every other rank has.
    """
    objective, training = loss_pass.objective, engine.training
    total = torch.zeros(2, dtype=torch.float64, device=engine.device)
    engine.eval()
    for batch in mismatched:
        batch = batch.to(engine.device)
        reference = loss_pass.reference(provider, batch) if objective.needs_reference else {}
        logp_T = engine(**forward_arguments(batch))["logp"]
        tokens = Tokens(logp_T, batch.lengths_S, **reference)
        policy_S, reference_S = sequence_sums(tokens, objective.options, paired=False)
        ratio_S = policy_S if reference_S is None else policy_S - reference_S
        total[0] += ratio_S.double().sum()
        total[1] += len(ratio_S)
    engine.train(training)
    total, count = sum_once(total)
    return (total / count).clamp_min(0).float()
