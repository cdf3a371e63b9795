"""What tests of the check before the first update share: stores, the check itself, wrong references."""

from types import SimpleNamespace

import torch
from torch import nn

from dpo_fast.data.batch import collate
from dpo_fast.losses import Totals
from dpo_fast.models.scoring import ScoringModel, forward_arguments
from dpo_fast.references import CachedReference
from dpo_fast.training.loss_pass import LossPass
from dpo_fast.training.start import check_start, other_batches


@torch.no_grad()
def stored_sums(model, layout: str, *, examples, batches) -> torch.Tensor:
    """fp32 [pairs, 2], as a store holds them."""
    sums = torch.zeros(len(examples), 2)
    for indices in batches:
        batch = collate([examples[i] for i in indices], layout, indices=indices)
        logp_T = model(**forward_arguments(batch))["logp"]
        parts = [part.double().sum() for part in logp_T.split(batch.lengths_S.tolist())]
        sums[indices] = torch.stack(parts).float().view(-1, 2)
    return sums


def stored(sums_PC: torch.Tensor) -> CachedReference:
    return CachedReference(sums_PC.flatten(), torch.full((len(sums_PC),), 2))


def check(model, layout: str, provider, objective=None, *, examples, first):
    """`check_start` on the first micro-batches of a rank that is alone."""
    batches = [collate([examples[i] for i in each], layout, indices=each) for each in first]
    split = SimpleNamespace(
        examples=examples, collate=lambda some, indices: collate(some, layout, indices=indices)
    )
    indices = [index for each in first for index in each]
    chosen = sum(len(examples[i]["chosen_ids"]) for i in indices)
    loss_pass = LossPass() if objective is None else LossPass(objective)
    totals = Totals(pairs=len(indices), chosen_tokens=chosen)
    again = other_batches(split, first[0])
    return check_start(model, batches, again, loss_pass, provider, totals)


def depends_on_the_batch(model: ScoringModel) -> ScoringModel:
    """The model with products that add in another order for another number of rows, as on a GPU.

    Products of this machine may give the same row in every batch.
    """

    def product(x, weight, bias=None):
        rows = x.flatten(0, -2).float()
        width = -(-rows.shape[1] // (1, 2, 3, 5, 8)[len(rows) % 5])
        parts = zip(rows.split(width, 1), weight.float().split(width, 1))
        total = sum(part @ w.T for part, w in parts).to(x.dtype)
        return total.view(*x.shape[:-1], -1)

    for module in model.modules():
        if type(module) is nn.Linear:
            module.forward = lambda x, weight=module.weight: product(x, weight)
    return model


def with_one_token_of_the_template_changed(examples):
    return [each | {"prompt_ids": [*each["prompt_ids"][:-1], 3]} for each in examples]


def with_a_token_more_in_the_template(examples):
    return [each | {"prompt_ids": [*each["prompt_ids"], 3]} for each in examples]


def with_a_boundary_too_late(examples):
    answers = ("chosen_ids", "rejected_ids")
    return [each | {name: each[name][1:] for name in answers} for each in examples]


def with_a_boundary_too_early(examples):
    answers = ("chosen_ids", "rejected_ids")
    return [
        {"prompt_ids": each["prompt_ids"][:-1]}
        | {name: each["prompt_ids"][-1:] + each[name] for name in answers}
        for each in examples
    ]


def without_the_end_of_turn(examples):
    answers = ("chosen_ids", "rejected_ids")
    return [each | {name: each[name][:-1] for name in answers} for each in examples]


WRONG = (
    with_one_token_of_the_template_changed,
    with_a_token_more_in_the_template,
    with_a_boundary_too_late,
    with_a_boundary_too_early,
    without_the_end_of_turn,
)
