"""Metrics on held-out pairs."""

from __future__ import annotations

import torch

from dpo_fast.losses import Objective, Totals
from dpo_fast.models.scoring import forward_arguments
from dpo_fast.training.metrics import MetricSums
from dpo_fast.training.step import pair_logps


@torch.no_grad()
def evaluate(engine, batches, objective: Objective, reference, totals: Totals, extras, tick=None):
    """`eval_` metrics of an evaluation set whose counts are `totals`; `tick` is called per batch.

    Every rank brings the same number of batches.
    """
    sums = MetricSums(engine.device)
    engine.eval()
    for batch in batches:
        batch = batch.to(engine.device)
        scores = engine(**forward_arguments(batch), extras=extras)
        pairs = pair_logps(scores["logp"], batch, reference(batch))
        sums.add(objective(pairs, totals), objective, pairs, scores, batch)
        if tick is not None:
            tick()
    engine.train()
    metrics = sums.read()
    for name in ("num_tokens", "pairs"):
        metrics.pop(name)
    return {f"eval_{name}": value for name, value in metrics.items()}
