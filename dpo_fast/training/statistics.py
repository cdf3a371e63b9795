"""What losses need that is estimated over all ranks: the kl of KTO and the delta of BCO.

kl     max(0, mean log-ratio of policy to reference of mismatched completions), over the global batch, with
       the weights that a step begins with
delta  mean reward of all sequences of all steps before this one, 0 in the first. (TRL's has the present
       micro-batch in it as well, so that it depends on how a batch is split.)

Neither depends on micro-batches, accumulation or ranks.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from dpo_fast.data.batch import ScoredBatch
from dpo_fast.losses.sums import Tokens, sequence_sums
from dpo_fast.models.scoring import forward_arguments
from dpo_fast.training.forward import LossPass


class Statistics:
    """The statistics that an objective names. values: those of the present step, [] fp32 each, by name."""

    def __init__(self, names: tuple[str, ...] = (), device: torch.device | str = "cpu") -> None:
        self.names = names
        self.values: dict[str, Tensor] = {}
        # Sum and count of rewards: of the steps that are over, and of this rank in the present one.
        self.rewards = torch.zeros(2, dtype=torch.float64, device=device)
        self._step = torch.zeros_like(self.rewards)

    def estimate(
        self, engine, mismatched: Iterable[ScoredBatch], loss_pass: LossPass, provider
    ) -> dict[str, Tensor]:
        """The values for the rows whose mismatched completions this rank has a share of. Collective."""
        values = {}
        if "kl" in self.names:
            values["kl"] = estimate_kl(engine, mismatched, loss_pass, provider)
        if "delta" in self.names:
            total, count = self.rewards
            values["delta"] = (total / count.clamp_min(1)).float()
        return values

    def begin_step(self, engine, mismatched, loss_pass: LossPass, provider) -> None:
        """Before the first forward of a step: `values` become its own. Collective."""
        self.values = self.estimate(engine, mismatched, loss_pass, provider)

    @torch.no_grad()
    def add(self, rewards_S: Tensor) -> None:
        """Rewards of a micro-batch of this step."""
        count = torch.tensor(rewards_S.numel(), dtype=torch.float64, device=rewards_S.device)
        self._step += torch.stack([rewards_S.double().sum(), count])

    def end_step(self) -> None:
        """The step counts from now on. Collective."""
        if "delta" in self.names:
            self.rewards += all_sum(self._step)
        self._step = torch.zeros_like(self.rewards)

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint between two steps must hold."""
        return {"rewards": self.rewards}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.rewards = state["rewards"].to(self.rewards.device)


@torch.no_grad()
def estimate_kl(engine, mismatched: Iterable[ScoredBatch], loss_pass: LossPass, provider) -> Tensor:
    """max(0, mean log-ratio of these batches of all ranks), [] fp32. Collective: every rank brings as
    many batches. The log-ratio is the loss's: token_clamp and reference_free change it too."""
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
    total, count = all_sum(total)
    return (total / count).clamp_min(0).float()


def all_sum(values: Tensor) -> Tensor:
    """Sum over all ranks. Collective."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values
