"""Metrics under the names people plot: sums on the device, means over all ranks when logged."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from dpo_fast.data.batch import ScoredBatch
from dpo_fast.losses import Preference
from dpo_fast.losses.groups import extremes, order_kept, score_spread
from dpo_fast.ops.segments import sum_sequences
from dpo_fast.training.distributed import all_sum
from dpo_fast.training.perf import Clock, Work

PAIR_METRICS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)
TIMED = ("perf/head_ms", "perf/reference_ms")
TOKEN_METRICS = {"entropy": "entropy", "is_top1": "mean_token_accuracy"}


class MetricSums:
    """Sums and counts since the last reading. Nothing leaves the device before `read`.

    A tie of rewards counts as half in `rewards/accuracies`: where policy and reference are equal the
    accuracy is 0.5, not 0. `loss` is the mean over steps of the global loss. Of completions that are good
    or bad by themselves, the desirable ones are `chosen` and the undesirable ones `rejected`, `rewards/margins` is the
    difference of their means, and there are no accuracies. Of groups the completions with the highest score
    are `chosen` and those with the lowest `rejected`, and accuracies are of any two of unequal scores.
    """

    def __init__(self, device: torch.device, work: Work | None = None) -> None:
        self.device, self.work, self.clock = device, work, Clock(device)
        self.values: dict[str, Tensor] = {}

    def _add(self, name: str, values: Tensor, count: Tensor | int | None = None) -> None:
        count = values.numel() if count is None else count
        pair = torch.stack(
            [values.double().sum(), torch.as_tensor(count, device=values.device).double().sum()]
        )
        self.values[name] = self.values[name] + pair if name in self.values else pair

    @torch.no_grad()
    def add(self, result: Preference, token_outputs: dict[str, Tensor], batch: ScoredBatch) -> None:
        """Add a micro-batch."""
        self._add("loss", result.loss, 0)  # shares add up; `step` counts
        sides = self._sides(batch)
        if batch.desirable_S is None and batch.scores_S is None:
            self._add_pairs(result)
        else:
            self._add_sides("rewards", result.rewards_S, sides)
            self._add_sides("logps", result.logps_S, sides)
        if batch.scores_S is not None:
            self._add_groups(result.rewards_S, batch)
        for name, values in result.watched.items():
            self._add(name, values)
        for extra, name in TOKEN_METRICS.items():
            if extra in token_outputs:
                self._add(name, token_outputs[extra])
        if "mean_logit" in token_outputs:
            sums_S = sum_sequences(token_outputs["mean_logit"], batch.lengths_S)
            self._add_sides("logits", sums_S, sides, batch.lengths_S)
        size = batch.input_ids.numel()
        self._count("perf/padding_fraction", batch.padding, size)
        # Prompts that are shared, and the last tokens of sequences, which predict nothing.
        self._count("perf/shared_prefix_saving", batch.tokens - size + batch.padding, batch.tokens)
        self._count("num_tokens", batch.tokens, 0)
        self._count("examples", batch.num_examples, 0)
        if self.work is not None:
            self._count("flops", self.work.of(batch), 0)

    def _add_pairs(self, result: Preference) -> None:
        chosen, rejected = result.rewards_S.view(-1, 2).unbind(1)
        accuracies = (chosen > rejected).double() + 0.5 * (chosen == rejected).double()
        logps = result.logps_S.view(-1, 2).unbind(1)
        values = (chosen, rejected, accuracies, chosen - rejected, *logps)
        for name, value in zip(PAIR_METRICS, values):
            self._add(name, value)

    def _add_groups(self, rewards_S: Tensor, batch: ScoredBatch) -> None:
        """Which of two the policy prefers, and the scores under TRL's names."""
        self._add("rewards/accuracies", *order_kept(rewards_S, batch.scores_S, batch.counts_P))
        spread_P = score_spread(batch.scores_S, batch.counts_P)
        self._add("reward", batch.scores_S)
        self._add("reward_std", spread_P)
        self._add("frac_reward_zero_std", (spread_P == 0).double())

    @staticmethod
    def _sides(batch: ScoredBatch) -> tuple[Tensor, Tensor]:
        """Which sequences are `chosen` and which `rejected`, bool [S] each."""
        if batch.scores_S is not None:
            return extremes(batch.scores_S, batch.counts_P)
        desirable_S = batch.desirable_S
        if desirable_S is None:
            desirable_S = torch.arange(len(batch.lengths_S), device=batch.lengths_S.device) % 2 == 0
        return desirable_S, ~desirable_S

    def _add_sides(
        self,
        name: str,
        values_S: Tensor,
        sides: tuple[Tensor, Tensor],
        count_S: Tensor | None = None,
    ) -> None:
        """Desirable sequences and undesirable ones under names of their own; by default each counts once."""
        for side, mine_S in zip(("chosen", "rejected"), sides):
            count = mine_S.sum() if count_S is None else torch.where(mine_S, count_S, 0).sum()
            self._add(f"{name}/{side}", torch.where(mine_S, values_S, 0), count)

    def note(self, values: Mapping[str, Tensor]) -> None:
        """Values of a step, [] each, the same on every rank."""
        for name, value in values.items():
            self._add(name, value, 1)

    def _count(self, name: str, value: float, count: int) -> None:
        self._add(name, torch.tensor(float(value), device=self.device), count)

    def step(self) -> None:
        """An optimiser step is over. Counted on one rank's behalf: the shares of all add up."""
        self._add("steps", torch.ones((), device=self.device), 0)

    def read(self) -> dict[str, float]:
        """Means over all ranks and micro-batches since the last call, weighted by count; then reset.

        `num_tokens`, `examples` and `flops` are sums; what the clock saw is milliseconds of a step.
        Collective: every rank must call it at the same step.
        """
        spent = self.clock.read()
        for name in TIMED if "steps" in self.values else ():
            self._count(name, spent.get(name, 0.0), 0)
        names = sorted(self.values)
        stacked = all_sum(torch.stack([self.values[name] for name in names]))
        world = dist.get_world_size() if dist.is_initialized() else 1
        self.values = {}
        sums = dict(zip(names, stacked.tolist()))
        steps = sums.pop("steps", [world, 0])[0] / world
        result = {"loss": sums.pop("loss")[0] / steps}
        for name in ("num_tokens", "examples", "flops"):
            if name in sums:
                result[name] = sums.pop(name)[0]
        for name in TIMED:
            if name in sums:
                result[name] = sums.pop(name)[0] / steps / world
        result |= {name: total / count for name, (total, count) in sums.items() if count}
        both = {"rewards/chosen", "rewards/rejected"} <= result.keys()
        if both and "rewards/margins" not in result:
            result["rewards/margins"] = result["rewards/chosen"] - result["rewards/rejected"]
        return result
