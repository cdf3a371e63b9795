"""One optimiser step."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from dpo_fast.data.batch import ScoredBatch
from dpo_fast.losses import Objective, Totals, preference
from dpo_fast.models.scoring import forward_arguments
from dpo_fast.training.metrics import MetricSums

EXTRAS = ("entropy", "mean_logit", "is_top1")


def train_step(
    engine,
    batches: Iterable[ScoredBatch],
    objective: Objective,
    reference,
    totals: Totals,
    sums: MetricSums,
    extras: tuple[str, ...] = EXTRAS,
    implementation: str = "auto",
) -> Tensor:
    """Forward and backward over this rank's micro-batches, then one update. Returns this rank's share
    of the global batch's loss, [] fp32: the shares of all ranks add up to it."""
    share = torch.zeros((), device=engine.device)
    for batch in batches:
        batch = batch.to(engine.device)
        reference_S = reference(batch)
        scores = engine(**forward_arguments(batch), extras=extras)
        result = preference(
            scores["logp"], batch.lengths_S, reference_S, objective, totals,
            implementation=implementation,
        )  # fmt: skip
        # DeepSpeed averages gradients over ranks; our loss is already divided by the global counts.
        engine.backward(result.loss * engine.world_size, scale_wrt_gas=False)
        engine.step()
        share += result.loss.detach()
        sums.add(result, scores, batch)
    return share
