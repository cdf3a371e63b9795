"""One optimiser step, and how token log-probabilities become pairs and metrics."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from dpo_fast.data.batch import ScoredBatch, sum_sequences
from dpo_fast.losses import Objective, PairLogps, Totals
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
) -> Tensor:
    """Forward and backward over this rank's micro-batches, then one update. Returns this rank's share
    of the global batch's loss, [] fp32: the shares of all ranks add up to it."""
    share = torch.zeros((), device=engine.device)
    for batch in batches:
        batch = batch.to(engine.device)
        reference_S = reference(batch)
        scores = engine(**forward_arguments(batch), extras=extras)
        pairs = pair_logps(scores["logp"], batch, reference_S)
        loss = objective(pairs, totals)
        # DeepSpeed averages gradients over ranks; our loss is already divided by the global counts.
        engine.backward(loss * engine.world_size, scale_wrt_gas=False)
        engine.step()
        share += loss.detach()
        sums.add(loss.detach(), objective, pairs, scores, batch)
    return share


def pair_logps(logp_T: Tensor, batch: ScoredBatch, reference_S: Tensor | None) -> PairLogps:
    """Token log-probabilities to summed ones of chosen and rejected."""
    chosen, rejected = sum_sequences(logp_T, batch.lengths_S).view(-1, 2).unbind(1)
    lengths = batch.lengths_S.view(-1, 2).unbind(1)
    references = (None, None) if reference_S is None else reference_S.view(-1, 2).unbind(1)
    return PairLogps(chosen, rejected, *lengths, *references)


def loss_at_reference(objective: Objective, pairs: PairLogps, totals: Totals) -> Tensor:
    """What the loss would be if the reference gave exactly the policy's log-probabilities."""
    same = PairLogps(
        pairs.chosen, pairs.rejected, pairs.chosen_lengths, pairs.rejected_lengths,
        pairs.chosen, pairs.rejected,
    )  # fmt: skip
    return objective(same, totals)
