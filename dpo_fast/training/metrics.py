"""Metrics under the names people plot: sums on the device, means over all ranks when logged."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from dpo_fast.data.batch import ScoredBatch
from dpo_fast.losses import Preference
from dpo_fast.ops.preference import sum_sequences

PAIR_METRICS = (
    "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins",
    "logps/chosen", "logps/rejected",
)  # fmt: skip
TOKEN_METRICS = {"entropy": "entropy", "is_top1": "mean_token_accuracy"}


class MetricSums:
    """Sums and counts since the last reading. Nothing leaves the device before `read`.

    A tie of rewards counts as half in `rewards/accuracies`: where policy and reference are equal the
    accuracy is 0.5, not 0. `loss` is the mean over steps of the global loss.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.values: dict[str, Tensor] = {}

    def _add(self, name: str, values: Tensor, count: Tensor | int | None = None) -> None:
        count = values.numel() if count is None else count
        pair = torch.stack(
            [values.double().sum(), torch.as_tensor(count, device=values.device).double().sum()]
        )
        self.values[name] = self.values[name] + pair if name in self.values else pair

    @torch.no_grad()
    def add(self, result: Preference, scores: dict[str, Tensor], batch: ScoredBatch) -> None:
        """Add a micro-batch."""
        self._add("loss", result.loss, 0)  # shares add up; `step` counts
        chosen, rejected = result.rewards_S.view(-1, 2).unbind(1)
        accuracies = (chosen > rejected).double() + 0.5 * (chosen == rejected).double()
        logps = result.logps_S.view(-1, 2).unbind(1)
        values = (chosen, rejected, accuracies, chosen - rejected, *logps)
        for name, value in zip(PAIR_METRICS, values):
            self._add(name, value)
        for extra, name in TOKEN_METRICS.items():
            if extra in scores:
                self._add(name, scores[extra])
        if "mean_logit" in scores:
            sums_P2 = sum_sequences(scores["mean_logit"], batch.lengths_S).view(-1, 2)
            lengths_P2 = batch.lengths_S.view(-1, 2)
            for side, name in enumerate(("logits/chosen", "logits/rejected")):
                self._add(name, sums_P2[:, side], lengths_P2[:, side].sum())
        size = batch.input_ids.numel()
        self._count("perf/padding_fraction", batch.padding, size)
        # Prompts that are shared, and the last tokens of sequences, which predict nothing.
        self._count("perf/shared_prefix_saving", batch.tokens - size + batch.padding, batch.tokens)
        self._count("num_tokens", batch.tokens, 0)
        self._count("pairs", batch.pairs, 0)

    def _count(self, name: str, value: int, count: int) -> None:
        self._add(name, torch.tensor(float(value), device=self.device), count)

    def step(self) -> None:
        """An optimiser step is over. Counted on one rank's behalf: the shares of all add up."""
        self._add("steps", torch.ones((), device=self.device), 0)

    def read(self) -> dict[str, float]:
        """Means over all ranks and micro-batches since the last call, weighted by count; then reset.

        `num_tokens` and `pairs` are sums. Collective: every rank must call it at the same step.
        """
        names = sorted(self.values)
        stacked = torch.stack([self.values[name] for name in names])
        world = 1
        if dist.is_initialized() and dist.get_world_size() > 1:
            world = dist.get_world_size()
            dist.all_reduce(stacked)
        self.values = {}
        sums = dict(zip(names, stacked.tolist()))
        steps = sums.pop("steps", [world, 0])[0] / world
        result = {"loss": sums.pop("loss")[0] / steps}
        for name in ("num_tokens", "pairs"):
            result[name] = sums.pop(name)[0]
        return result | {name: total / count for name, (total, count) in sums.items() if count}
