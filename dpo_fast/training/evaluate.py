"""Metrics on held-out examples."""

from __future__ import annotations

import torch

from dpo_fast.losses import Totals
from dpo_fast.training.coupled import BatchTable
from dpo_fast.training.forward import LossPass
from dpo_fast.training.metrics import MetricSums


@torch.no_grad()
def evaluate(engine, batches, loss_pass: LossPass, provider, totals: Totals, statistics=None):
    """`eval_` metrics of an evaluation set whose counts are `totals`. Every rank brings the same number
    of batches."""
    sums = MetricSums(engine.device)
    coupled = loss_pass.objective.coupled
    table = BatchTable(list(range(totals.pairs)), loss_pass, engine.device) if coupled else None
    engine.eval()
    for batch in batches:
        batch = batch.to(engine.device)
        reference = loss_pass.reference(provider, batch)
        token_outputs = loss_pass.token_outputs(engine, batch)
        sums.add(
            loss_pass.loss(token_outputs, reference, batch, totals, statistics),
            token_outputs,
            batch,
        )
        if coupled:
            table.add(token_outputs, reference, batch)
    engine.train()
    sums.note(statistics or {})
    metrics = sums.read()
    if coupled:  # its rows meet over the whole set, not within a micro-batch
        metrics["loss"] = table.loss(totals, statistics)[0].item()
    for name in ("num_tokens", "examples"):
        del metrics[name]
    return {f"eval_{name}": value for name, value in metrics.items()}
