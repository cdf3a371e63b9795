"""The check before the first update (`start.py`), on the batches of a run.

compare_at_start    once everything is there
check_before_pass   before reference log-probs are computed over all of the data, which takes hours with a
                    large model: the examples of the first step are scored first, as that pass will
check_twice         for `dpo-fast reference`, which has no policy: the model against itself
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch
from torch import Tensor

from dpo_fast.data.batch import ScoredBatch
from dpo_fast.errors import UserError
from dpo_fast.models.scoring import forward_arguments
from dpo_fast.references.compute import length_batches
from dpo_fast.references.providers import LiveReference, score_tokens
from dpo_fast.training import data_ranks, distributed
from dpo_fast.training.config import RunConfig
from dpo_fast.training.console import say
from dpo_fast.training.loss_pass import LossPass
from dpo_fast.training.splits import Split
from dpo_fast.training.start import (
    Squares,
    Start,
    by_example,
    check_finite,
    check_start,
    evaluate_again,
    first_batches,
    measure_start,
    other_batches,
)
from dpo_fast.training.weights import identities

# Nats a token that two evaluations may differ by. Rounding moves deep models by far less;
# dropout of 0.1 moves them by more.
MOST = {"fp32": 0.01, "bf16": 0.5}


class FewScored(LiveReference):
    """Log-probs of a few examples. tokens: those of each example, by its place in the data."""

    def __init__(self, tokens: dict[int, Tensor]) -> None:
        self.tokens = tokens

    def token_logps(self, batch: ScoredBatch) -> Tensor:
        few = [self.tokens[index] for index in batch.indices_P.tolist()]
        return torch.cat(few) if few else torch.zeros(0, device=batch.input_ids.device)


def starts_at_reference(config: RunConfig, weights: dict[str, str]) -> bool:
    """Whether the reference is the policy before its first update. weights: from `identities`."""
    scored = config.loss.objective.needs_reference and config.reference_spec.scores
    return scored and weights["reference.path"] == weights["model.path"]


def compare_at_start(run) -> Start | None:
    """Compare policy and reference, where they are the same model, and say it. Collective.

    Columns of the data do not say which model they are of: what they differ by is said and no error.

    Raises:
        UserError: they differ by more than rounding, or two evaluations of the policy do.
    """
    given = run.config.reference_spec.columns and run.config.loss.objective.needs_reference
    if not given and not starts_at_reference(run.config, run.weights):
        return None
    split, number = run.train.at(0)
    inputs = _batches(split, number)
    compare = measure_start if given else check_start
    totals, where = _totals(split, number), split.examples.where
    found = compare(run.engine, *inputs, *run.loss_and_reference("train"), totals, where)
    check_noise(run.config, found, f"model.path={run.config.model.path}")
    say(f"step 0: {found.of_columns if given else found}")
    return None if given else found


def check_before_pass(
    config: RunConfig, engine, train: Split, loss_pass: LossPass, scorer, provider=None
) -> None:
    """As `compare_at_start`, before `scorer` computes log-probs of all examples. Collective.

    scorer: the reference, or the model that wrote the completions.
    provider: the reference where it is there already.

    Raises:
        UserError: policy and reference differ by more than rounding, or two evaluations of the policy do.
    """
    if not starts_at_reference(config, identities(config)):
        return
    few = score_first(config, scorer, train)
    loss_pass = replace(loss_pass, old=few)
    totals, where = _totals(train, 0), train.examples.where
    found = check_start(engine, *_batches(train, 0), loss_pass, provider or few, totals, where)
    check_noise(config, found, f"model.path={config.model.path}")


@torch.no_grad()
def check_twice(config: RunConfig, split: Split, path: str, scorer) -> None:
    """Check that a model gives the same log-probs twice, before it scores all examples. Collective.

    path: of the model. Raises UserError.
    """
    device = distributed.device()
    squares, seen = Squares(device), {}
    batches, again = _batches(split, 0)
    for batch in batches:
        batch = batch.to(device)
        logp_T = scorer(**forward_arguments(batch))["logp"]
        seen |= by_example(logp_T, batch)
    check_finite(split.examples.where, **{path: seen})
    evaluate_again(scorer, again, seen, squares)
    check_noise(config, squares.start(0.0, 0.0, 0.0), path)


def check_noise(config: RunConfig, found: Start, name: str) -> None:
    """Raises UserError if two evaluations of a model differ by more than rounding can. name: of the model.

    A reference that is as noisy as the policy differs from it by no more than two evaluations of it do.
    """
    if not found.rounding <= MOST[config.model.precision]:
        raise UserError(
            f"{name} does not give the same log-probs twice: two evaluations of the first "
            f"sequences differ by {found.rounding:.2g} nats a token, and rounding in "
            f"{config.model.precision} by less than {MOST[config.model.precision]:.2g}. Look at dropout or "
            "other noise in the model's forward"
        )


def score_first(config: RunConfig, scorer, split: Split) -> FewScored:
    """Scores this rank's examples of the first batches, batched as all examples will be. Collective."""
    count, _ = first_batches(split, 0)
    size = (config.train.micro_batch_size, config.train.tokens_per_batch)
    of_ranks = []
    for rank in range(data_ranks.data_ranks()):
        rows = itertools.chain(*split.sampler.micro_batches(0, rank)[:count])
        of_ranks.append(length_batches(rows, split.costs, *size))
    mine = of_ranks[data_ranks.data_rank()]
    empty = max(map(len, of_ranks)) - len(mine)  # every rank takes part in every forward
    tokens: dict[int, Tensor] = {}
    was_training = getattr(scorer, "training", False)
    scorer.eval()
    for rows in [*mine, *([[]] * empty)]:
        batch = split.collate([split.examples[row] for row in rows], rows)
        batch = batch.to(distributed.device())
        tokens |= by_example(score_tokens(scorer, batch), batch)
    scorer.train(was_training)
    return FewScored(tokens)


def _batches(split: Split, step: int) -> tuple[list[ScoredBatch], list[ScoredBatch]]:
    """This rank's first batches of a step, and examples of the first of them in other batches."""
    count, _ = first_batches(split, step)
    first = split.sampler.micro_batches(step, data_ranks.data_rank())[0]
    return list(itertools.islice(split.batches(step), count)), other_batches(split, first)


def _totals(split: Split, step: int):
    return split.totals(first_batches(split, step)[1])
