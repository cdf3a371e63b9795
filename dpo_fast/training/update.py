"""One update of a run: the pairs of a step, and the kind of step that its losses want."""

from __future__ import annotations

from torch import Tensor

from dpo_fast.references import EmaReference
from dpo_fast.training.coupled import coupled_step
from dpo_fast.training.metrics import MetricSums
from dpo_fast.training.prepare import Run
from dpo_fast.training.step import train_step


def update(run: Run, step: int, sums: MetricSums) -> Tensor:
    """Optimiser step number `step`, counted from 0. This rank's share of the loss, [] fp32. Collective."""
    split, index = run.train.at(step)
    rows, statistics = split.sampler.global_batch(index), run.statistics
    models = run.loss_and_reference("train")
    statistics.begin_step(run.engine, split.mismatched(rows), *models)
    common = (run.engine, split.batches(index), *models, split.totals(rows), sums)
    if run.loss_pass.objective.coupled:
        share = coupled_step(*common, rows, statistics)
    else:
        share = train_step(*common, statistics)
    sums.note(statistics.values)
    statistics.end_step()
    if isinstance(reference := run.references["train"], EmaReference):
        reference.after_step(step + 1)
    return share
