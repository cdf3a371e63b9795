"""One optimiser step."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from dpo_fast.data.batch import ScoredBatch
from dpo_fast.losses import Totals
from dpo_fast.training.forward import LossPass
from dpo_fast.training.metrics import MetricSums
from dpo_fast.training.statistics import Statistics


def train_step(
    engine,
    batches: Iterable[ScoredBatch],
    loss_pass: LossPass,
    reference,
    totals: Totals,
    sums: MetricSums,
    statistics: Statistics | None = None,
) -> Tensor:
    """Forward and backward over this rank's micro-batches, then one update. Returns this rank's share
    of the global batch's loss, [] fp32: the shares of all ranks add up to it."""
    statistics = statistics or Statistics(device=engine.device)
    share = torch.zeros((), device=engine.device)
    for batch in batches:
        batch = batch.to(engine.device)
        with sums.clock.time("perf/reference_ms"):
            compared = loss_pass.reference(reference, batch)
        scores = loss_pass.scores(engine, batch)
        result = loss_pass.loss(scores, compared, batch, totals, statistics.values)
        # DeepSpeed averages gradients over ranks; our loss is already divided by the global counts.
        engine.backward(result.loss * engine.world_size, scale_wrt_gas=False)
        engine.step()
        share += result.loss.detach()
        sums.add(result, scores, batch)
        statistics.add(result.rewards_S)
    return share
