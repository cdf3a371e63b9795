"""Losses in which the rows of a global batch meet (aot sorts them): slopes first, then the backward.

A first pass, without gradients, scores the whole global batch on all ranks. The loss of all its sequences
gives the slope of each one's log-probability; the second pass is forward and backward with those slopes, so
that the result is the same however the batch was split. It costs one more forward.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from dpo_fast.data.batch import ScoredBatch
from dpo_fast.losses import Preference, Totals
from dpo_fast.losses.preference import as_pairs
from dpo_fast.losses.sums import Tokens, sequence_sums
from dpo_fast.training.forward import LossPass
from dpo_fast.training.metrics import MetricSums
from dpo_fast.training.statistics import Statistics


class BatchTable:
    """Sums of every sequence of a global batch, in the order of its rows, gathered from all ranks."""

    def __init__(self, rows: list[int], loss_pass: LossPass, device: torch.device) -> None:
        self.place = {row: index for index, row in enumerate(rows)}
        self.loss_pass = loss_pass
        # Policy, reference, lengths; of chosen and rejected.
        self.values = torch.zeros(3, len(rows), 2, dtype=torch.float64, device=device)

    def places(self, batch: ScoredBatch) -> list[int]:
        return [self.place[row] for row in batch.indices_P.tolist()]

    @torch.no_grad()
    def add(self, token_outputs: Mapping[str, Tensor], reference: dict, batch: ScoredBatch) -> None:
        """Enter a micro-batch of this rank."""
        mine = self.places(batch)
        columns = (*batch_sums(token_outputs, reference, batch, self.loss_pass), batch.lengths_S)
        for which, values_S in enumerate(columns):
            if values_S is not None:
                self.values[which, mine] = values_S.double().view(-1, 2)

    def loss(self, totals: Totals, statistics: Mapping | None = None) -> tuple[Tensor, Tensor]:
        """The loss of the whole batch, [] fp64, and its slope by every sequence's sum, [P, 2].
        Collective."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(self.values)  # one rank's value plus zeros: exact
        policy, reference, lengths = (x.flatten() for x in self.values.unbind(0))
        objective = self.loss_pass.objective
        with torch.enable_grad():
            policy = policy.clone().requires_grad_()
            reference = reference if objective.needs_reference else None
            pairs = as_pairs(policy, lengths, reference, statistics=statistics)
            loss = objective(pairs, totals)
            (slopes,) = torch.autograd.grad(loss, policy)
        return loss.detach(), slopes.view(-1, 2)


def coupled_step(
    engine,
    batches: Iterable[ScoredBatch],
    loss_pass: LossPass,
    provider,
    totals: Totals,
    sums: MetricSums,
    rows: list[int],
    statistics: Statistics | None = None,
) -> Tensor:
    """As `train_step`, for an objective that is coupled. rows: the global batch, all ranks' of it."""
    statistics = statistics or Statistics(device=engine.device)
    batches = [batch.to(engine.device) for batch in batches]
    with sums.clock.time("perf/reference_ms"):
        reference = [loss_pass.reference(provider, batch) for batch in batches]
    table = BatchTable(rows, loss_pass, engine.device)
    with torch.no_grad():
        for batch, own in zip(batches, reference):
            table.add(loss_pass.token_outputs(engine, batch), own, batch)
    loss, slopes = table.loss(totals, statistics.values)
    share = loss.float() / engine.world_size
    for batch, own in zip(batches, reference):
        token_outputs = loss_pass.token_outputs(engine, batch)
        logps_S, reference_S = batch_sums(token_outputs, own, batch, loss_pass)
        slope_S = slopes[table.places(batch)].flatten().to(logps_S.dtype)
        engine.backward((logps_S * slope_S).sum() * engine.world_size, scale_wrt_gas=False)
        engine.step()
        rewards_S = loss_pass.objective.rewards(as_pairs(logps_S, batch.lengths_S, reference_S))
        # The loss belongs to no micro-batch more than to another.
        sums.add(
            Preference(share / len(batches), logps_S.detach(), rewards_S), token_outputs, batch
        )
        statistics.add(rewards_S)
    return share


def batch_sums(token_outputs, reference: dict, batch: ScoredBatch, loss_pass: LossPass):
    """Sums of policy and reference (or None), [S] each."""
    tokens = Tokens(token_outputs["logp"], batch.lengths_S, **reference)
    return sequence_sums(tokens, loss_pass.objective.options, paired=True)
