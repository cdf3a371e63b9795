"""One optimiser step.

Losses in which the rows of a global batch meet (aot sorts them): slopes first, then the backward.

A first pass, without gradients, scores the whole global batch on all ranks. The loss of all its sequences
gives the slope of each one's log-probability; the second pass is forward and backward with those slopes, so
that the result is the same however the batch was split. It costs one more forward.

Metrics on held-out examples.

Checks of a run that costs one forward: is the reference the policy that training starts from?
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from dpo_fast.data.batch import ScoredBatch
from dpo_fast.errors import UserError
from dpo_fast.losses import Preference, Totals
from dpo_fast.losses.preference import as_pairs
from dpo_fast.losses.sums import Tokens, sequence_sums
from dpo_fast.training import distributed
from dpo_fast.training.loss_pass import LossPass, Statistics, of_tokens
from dpo_fast.training.metrics import MetricSums


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


TOLERANCE = {"fp32": 1e-6, "bf16": 1e-3}


@torch.no_grad()
def check_start(
    engine, batch: ScoredBatch, loss_pass: LossPass, provider, totals: Totals, dtype: str
) -> tuple[float, float]:
    """Loss of the first step's batch before any update, and what it must be: ln 2 for sigmoid.

    What it must be is the same loss with the policy's own log-probabilities as the reference, so it
    holds for any loss. The tolerance (1e-6 in fp32, 1e-3 in bf16) grows with the loss itself.

    Raises:
        UserError: they differ, which means that the reference is not the policy at its start.
    """
    batch = batch.to(engine.device)
    reference = loss_pass.reference(provider, batch)
    token_outputs = loss_pass.token_outputs(engine, batch)
    own = reference | of_tokens(token_outputs["logp"], batch)
    losses = [loss_pass.loss(token_outputs, each, batch, totals).loss for each in (reference, own)]
    values = torch.stack(losses).double()
    if distributed.world_size() > 1:
        torch.distributed.all_reduce(values)
    loss, expected = values.tolist()
    if not abs(loss - expected) <= TOLERANCE[dtype] * max(1.0, abs(expected)):
        raise UserError(
            f"before the first update the loss is {loss:.7f} and should be {expected:.7f}, because "
            "policy and reference are the same model there. Look at reference.cache_dir (a reference of "
            "another model?), at dropout or other noise in the model's forward, and at model.dtype"
        )
    return loss, expected
