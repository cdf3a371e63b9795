"""Metrics under the names people plot: sums on the device, means over all ranks when logged."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from dpo_fast.data.batch import ScoredBatch
from dpo_fast.losses import Preference, ScoredGroups
from dpo_fast.losses.groups import score_spread
from dpo_fast.modules.metrics import sequence_metrics, token_metrics
from dpo_fast.training.balance import router_metrics
from dpo_fast.training.data_ranks import data_ranks, sum_once
from dpo_fast.training.perf import Clock, Work

TIMED = ("perf/head_ms", "perf/reference_ms")
PER_RANK = ("steps", *TIMED)  # every rank adds its own of the same
SUMMED = ("num_tokens", "examples", "flops")
ROUTERS = ("router_experts", "router_layers")  # of a mixture of experts: tensors of sums, no means


class MetricSums:
    """Sums and counts since the last reading. Nothing leaves the device before `read`.

    Names and sides are those of `dpo_fast.modules.metrics`. Besides:

    loss: mean over steps of the global loss.
    rewards/margins: of batches without pairs, the difference of the means of both sides.
    rewards/longer: share of the pairs of unequal length whose longer answer has the greater reward.
    reward, reward_std, frac_reward_zero_std: the scores of groups, under TRL's names.
    aux_loss, router/...: of a mixture of experts (`router_metrics`), over all tokens since the last call.
    """

    def __init__(self, device: torch.device, work: Work | None = None) -> None:
        self.device, self.work, self.clock = device, work, Clock(device)
        self.values: dict[str, Tensor] = {}
        self._before: dict[str, Tensor] = {}

    def _add(self, name: str, values: Tensor, count: Tensor | int | None = None) -> None:
        count = values.numel() if count is None else count
        if not isinstance(count, Tensor):
            count = self._filled(count)
        pair = torch.stack([values.double().sum(), count.double().sum()])
        self.values[name] = self.values[name] + pair if name in self.values else pair

    @torch.no_grad()
    def add(self, result: Preference, token_outputs: dict[str, Tensor], batch: ScoredBatch) -> None:
        """Add a micro-batch."""
        groups = None
        if batch.scores_S is not None:
            groups = ScoredGroups(batch.scores_S, batch.counts_P)
            self._add_scores(groups)
        labels = batch.desirable_S, groups
        self._add("loss", result.loss, 0)  # shares add up; `step` counts
        metrics = sequence_metrics(result.logps_S, result.rewards_S, *labels)
        metrics |= token_metrics(token_outputs, batch.lengths_S, *labels)
        for name, (values, count) in metrics.items():
            self._add(name, values, count)
        if batch.desirable_S is None and groups is None:
            self._add_longer(result.rewards_S, batch.lengths_S)
        for name, values in result.watched.items():
            self._add(name, values)
        for name in ROUTERS:
            if name in token_outputs:
                before = self.values.get(name)
                sums = token_outputs[name]
                self.values[name] = sums if before is None else before + sums
        size = batch.input_ids.numel()
        self._count("perf/padding_fraction", batch.padding, size)
        # Saved: what sequences have in common, and last tokens, which predict nothing.
        self._count("perf/shared_prefix_saving", batch.tokens - size + batch.padding, batch.tokens)
        self._count("num_tokens", batch.tokens, 0)
        self._count("examples", batch.num_examples, 0)
        if self.work is not None:
            self._count("flops", self.work.of(batch), 0)

    def _add_longer(self, rewards_S: Tensor, lengths_S: Tensor) -> None:
        """How often the longer answer of a pair has the greater reward; of pairs of unequal length."""
        rewards_P = rewards_S.view(-1, 2).diff()
        longer_P = lengths_S.view(-1, 2).diff().sign()
        agrees_P = (rewards_P.sign() * longer_P + 1) / 2
        self._add("rewards/longer", agrees_P * longer_P.abs(), longer_P.abs())

    def _add_scores(self, groups: ScoredGroups) -> None:
        """The scores under TRL's names."""
        spread_P = score_spread(groups.scores_S, groups.counts_P)
        self._add("reward", groups.scores_S)
        self._add("reward_std", spread_P)
        self._add("frac_reward_zero_std", (spread_P == 0).double())

    def note(self, values: Mapping[str, Tensor]) -> None:
        """Values of a step, [] each, the same on every rank."""
        for name, value in values.items():
            self._add(name, value, 1)

    def _count(self, name: str, value: float, count: int) -> None:
        self._add(name, self._filled(value), count)

    def _filled(self, value: float) -> Tensor:
        """A number that the host knows. Copying one to a GPU would wait for all work there."""
        return torch.full((), value, dtype=torch.float64, device=self.device)

    def begin(self) -> None:
        """An optimiser step begins."""
        self._before = dict(self.values)

    def step(self, skipped: Tensor | None = None) -> None:
        """An optimiser step is over. Every rank counts it; `read` divides by the ranks.

        skipped: whether it was not taken, [] bool. Then only what was read counts, and no metric.
        """
        self._add("steps", torch.ones((), device=self.device), 0)
        if skipped is None:
            return
        for name in self.values.keys() - set(SUMMED):
            value = self.values[name]
            before = self._before.get(name, torch.zeros_like(value))
            self.values[name] = torch.where(skipped, before, value)

    def read(self) -> dict[str, float]:
        """Means over all ranks and micro-batches since the last call, weighted by count; then reset.

        `num_tokens`, `examples` and `flops` are sums. Times are milliseconds per step.
        Collective: every rank must call it at the same step.
        """
        spent = self.clock.read()
        for name in TIMED if "steps" in self.values else ():
            self._count(name, spent.get(name, 0.0), 0)
        routers = [sum_once(self.values.pop(name)) for name in ROUTERS if name in self.values]
        names = sorted(self.values)
        stacked = sum_once(torch.stack([self.values[name] for name in names]))
        world = data_ranks()
        self.values = {}
        sums = dict(zip(names, stacked.tolist()))
        steps = sums.pop("steps", [world, 0])[0] / world
        result = {"loss": sums.pop("loss")[0] / steps if steps else math.nan}
        for name in SUMMED:
            if name in sums:
                result[name] = sums.pop(name)[0]
        for name in TIMED:
            if name in sums:
                result[name] = sums.pop(name)[0] / max(steps, 1) / world
        result |= {name: total / count for name, (total, count) in sums.items() if count}
        if routers:
            result |= router_metrics(*routers)
        both = {"rewards/chosen", "rewards/rejected"} <= result.keys()
        if both and "rewards/margins" not in result:
            result["rewards/margins"] = result["rewards/chosen"] - result["rewards/rejected"]
        return result
