"""What a run does with the batches of a global batch or an evaluation set.

`train_step`    one optimiser step
`coupled_step`  the same in two passes, for a loss that compares all pairs of a global batch
`evaluate`      metrics on held-out examples
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from dpo_fast.data.batch import ScoredBatch
from dpo_fast.losses import Preference, Totals
from dpo_fast.losses.from_tokens import as_pairs
from dpo_fast.losses.sums import Tokens, sequence_sums
from dpo_fast.training import data_ranks
from dpo_fast.training.balance import Balance, count_choices
from dpo_fast.training.eval_examples import EvalTable
from dpo_fast.training.finite import backward_scale
from dpo_fast.training.loss_pass import LossPass, Statistics
from dpo_fast.training.metrics import MetricSums


def train_step(
    engine,
    batches: Iterable[ScoredBatch],
    loss_pass: LossPass,
    provider,
    totals: Totals,
    sums: MetricSums,
    statistics: Statistics,
) -> Tensor:
    """Forward and backward over this rank's micro-batches, then one update.

    Returns:
        This rank's share of the loss of the global batch, [] fp32; those of all data ranks add up to it.
    """
    share = torch.zeros((), device=engine.device)
    batches, balance = balanced(engine, batches, loss_pass)
    for batch in batches:
        batch = batch.to(engine.device)
        with sums.clock.time("perf/reference_ms"):
            reference = loss_pass.reference(provider, batch)
        token_outputs = loss_pass.token_outputs(engine, batch)
        result = loss_pass.loss(token_outputs, reference, batch, totals, statistics.values)
        loss = result.loss if balance is None else result.loss + balance.share(token_outputs)
        # DeepSpeed averages gradients over ranks; the loss is already divided by the global counts. Ranks
        # that share a batch have the same loss, and each a part of its gradient.
        scale = backward_scale(loss, engine.world_size)
        engine.backward(loss * scale, scale_wrt_gas=False)
        engine.step()
        share += loss.detach()
        sums.add(result, token_outputs, batch)
        statistics.add(result.rewards_S)
    return share


def balanced(
    engine, batches: Iterable[ScoredBatch], loss_pass: LossPass
) -> tuple[Iterable[ScoredBatch], Balance | None]:
    """The batches of a step, and the balancing loss of experts where there is one. Collective."""
    if loss_pass.routing is None or not loss_pass.routing.coefficient:
        return batches, None
    batches, balance = list(batches), Balance(loss_pass.routing.coefficient)
    if len(batches) > 1:
        count_choices(engine, batches, balance)
    return batches, balance


def coupled_step(
    engine,
    batches: Iterable[ScoredBatch],
    loss_pass: LossPass,
    provider,
    totals: Totals,
    sums: MetricSums,
    statistics: Statistics,
    indices: list[int],
) -> Tensor:
    """As `train_step`, for a coupled loss: one that compares all pairs of a global batch, as aot does.

    The first pass scores the global batch on all ranks, without gradients. Its loss gives a slope for
    every sequence's log-probability; the second pass is forward and backward with those slopes. So the
    result does not depend on how the batch was split. It costs one more forward.

    indices: places in the data of the global batch, all ranks' pairs.
    """
    batches = [batch.to(engine.device) for batch in batches]
    with sums.clock.time("perf/reference_ms"):
        references = [loss_pass.reference(provider, batch) for batch in batches]
    table = BatchTable(indices, loss_pass, engine.device)
    routing = loss_pass.routing
    balance = Balance(routing.coefficient) if routing and routing.coefficient else None
    with torch.no_grad():
        for batch, reference in zip(batches, references):
            token_outputs = loss_pass.token_outputs(engine, batch)
            table.add(token_outputs, reference, batch)
            if balance is not None:
                balance.count(token_outputs)
    if balance is not None:
        balance.close()
    loss, slopes = table.loss(totals, statistics.values)
    share = loss.float() / data_ranks.data_ranks()
    scale, whole = backward_scale(share, engine.world_size), share
    for batch, reference in zip(batches, references):
        token_outputs = loss_pass.token_outputs(engine, batch)
        logps_S, reference_S = batch_sums(token_outputs, reference, batch, loss_pass)
        slope_S = slopes[table.places(batch)].flatten().to(logps_S.dtype)
        surrogate = (logps_S * slope_S).sum()
        if balance is not None:
            part = balance.share(token_outputs)
            surrogate, whole = surrogate + part, whole + part.detach()
        engine.backward(surrogate * scale, scale_wrt_gas=False)
        engine.step()
        rewards_S = loss_pass.objective.rewards(as_pairs(logps_S, batch.lengths_S, reference_S))
        # The loss is of the whole global batch: every micro-batch gets the same part of it.
        result = Preference(share / len(batches), logps_S.detach(), rewards_S)
        sums.add(result, token_outputs, batch)
        statistics.add(rewards_S)
    return whole


class BatchTable:
    """Sums of every sequence of a global batch, gathered from all ranks in the order of `indices`.

    An example that comes twice, as mixtures repeat them, has one place. Its copies have the same sums, and
    each gets its part of the slope.
    """

    def __init__(self, indices: list[int], loss_pass: LossPass, device: torch.device) -> None:
        self.place = {index: place for place, index in enumerate(dict.fromkeys(indices))}
        rows = torch.tensor([self.place[index] for index in indices], dtype=torch.long)
        copies = rows.bincount(minlength=len(self.place)).double()
        self.rows, self.copies = (x.to(device, non_blocking=True) for x in (rows, copies))
        self.loss_pass = loss_pass
        # Policy, reference and lengths; of chosen and rejected.
        self.values = torch.zeros(3, len(self.place), 2, dtype=torch.float64, device=device)

    def places(self, batch: ScoredBatch) -> Tensor:
        """Where the pairs of a micro-batch stand in the table, int64 [P]. Waits for nothing on a GPU."""
        rows = [self.place[index] for index in batch.indices_P.tolist()]
        return torch.tensor(rows, dtype=torch.long).to(self.values.device, non_blocking=True)

    @torch.no_grad()
    def add(self, token_outputs: Mapping[str, Tensor], reference: dict, batch: ScoredBatch) -> None:
        """Enter a micro-batch of this rank."""
        mine = self.places(batch)
        columns = (*batch_sums(token_outputs, reference, batch, self.loss_pass), batch.lengths_S)
        for which, values_S in enumerate(columns):
            if values_S is not None:
                values = values_S.double().view(-1, 2) / self.copies[mine, None]
                self.values[which].index_add_(0, mine, values)

    def loss(self, totals: Totals, statistics: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The loss of the whole batch, [] fp64, and its slopes by the policy's sums, fp64 [places, 2].

        Collective. Call it once, when all micro-batches are entered.
        """
        values = data_ranks.sum_once(self.values)  # one rank's value plus zeros: exact
        policy, reference, lengths = (x[self.rows].flatten() for x in values.unbind(0))
        objective = self.loss_pass.objective
        with torch.enable_grad():
            policy = policy.clone().requires_grad_()
            reference = reference if objective.needs_reference else None
            pairs = as_pairs(policy, lengths, reference, statistics=statistics)
            loss = objective(pairs, totals)
            (slopes,) = torch.autograd.grad(loss, policy)
        slopes = torch.zeros_like(self.values[0]).index_add_(0, self.rows, slopes.view(-1, 2))
        return loss.detach(), slopes / self.copies[:, None]


def batch_sums(
    token_outputs: Mapping[str, Tensor], reference: dict, batch: ScoredBatch, loss_pass: LossPass
) -> tuple[Tensor, Tensor | None]:
    """Sums of the policy's and the reference's log-probabilities as the loss takes them, [S] each."""
    tokens = Tokens(token_outputs["logp"], batch.lengths_S, **reference)
    return sequence_sums(tokens, loss_pass.objective.options, paired=True)


@torch.no_grad()
def evaluate(
    engine,
    batches: Iterable[ScoredBatch],
    loss_pass: LossPass,
    provider,
    totals: Totals,
    statistics: Mapping[str, Tensor],
    examples: EvalTable | None = None,
) -> dict[str, float]:
    """Metrics of an evaluation set, under names with `eval_` before them. Collective.

    batches: this rank's share, as many as every other rank has.
    totals: counts of the whole set.
    statistics: values of `Statistics.estimate` for the whole set.
    examples: receives what each example got.
    """
    sums = MetricSums(engine.device)
    coupled = loss_pass.objective.coupled
    table = BatchTable(list(range(totals.pairs)), loss_pass, engine.device) if coupled else None
    engine.eval()
    for batch in batches:
        batch = batch.to(engine.device)
        reference = loss_pass.reference(provider, batch)
        token_outputs = loss_pass.token_outputs(engine, batch)
        result = loss_pass.loss(token_outputs, reference, batch, totals, statistics)
        sums.add(result, token_outputs, batch)
        if examples is not None:
            examples.add(result, batch)
        if coupled:
            table.add(token_outputs, reference, batch)
    engine.train()
    sums.note(statistics)
    metrics = sums.read()
    if coupled:  # pairs are compared over the whole set, not within a micro-batch
        metrics["loss"] = table.loss(totals, statistics)[0].item()
    for name in ("num_tokens", "examples"):
        del metrics[name]
    return {f"eval_{name}": value for name, value in metrics.items()}
