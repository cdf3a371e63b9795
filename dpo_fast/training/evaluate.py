"""Metrics on held-out pairs."""

from __future__ import annotations

import torch

from dpo_fast.losses import Objective, Totals, preference
from dpo_fast.models.scoring import forward_arguments
from dpo_fast.training.metrics import MetricSums


@torch.no_grad()
def evaluate(
    engine, batches, objective: Objective, reference, totals: Totals, extras, implementation="auto"
):
    """`eval_` metrics of an evaluation set whose counts are `totals`. Every rank brings the same number
    of batches."""
    sums = MetricSums(engine.device)
    engine.eval()
    for batch in batches:
        batch = batch.to(engine.device)
        scores = engine(**forward_arguments(batch), extras=extras)
        result = preference(
            scores["logp"], batch.lengths_S, reference(batch), objective, totals,
            implementation=implementation,
        )  # fmt: skip
        sums.add(result, scores, batch)
    engine.train()
    metrics = sums.read()
    for name in ("num_tokens", "pairs"):
        metrics.pop(name)
    return {f"eval_{name}": value for name, value in metrics.items()}
