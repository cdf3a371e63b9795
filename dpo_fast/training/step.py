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
    provider,
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
            reference = loss_pass.reference(provider, batch)
        token_outputs = loss_pass.token_outputs(engine, batch)
        result = loss_pass.loss(token_outputs, reference, batch, totals, statistics.values)
        # DeepSpeed averages gradients over ranks; our loss is already divided by the global counts.
        engine.backward(result.loss * engine.world_size, scale_wrt_gas=False)
        engine.step()
        share += result.loss.detach()
        sums.add(result, token_outputs, batch)
        statistics.add(result.rewards_S)
    return share
