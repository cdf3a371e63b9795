"""Rows shared by all ranks of a job, against the whole row on each: log-probs and every gradient."""

from __future__ import annotations

from itertools import product

import torch
import torch.distributed as dist

from dpo_fast.data.batch import ScoredBatch, collate_trees
from dpo_fast.data.layouts import LAYOUTS
from dpo_fast.models import ScoringModel
from dpo_fast.models.attention import NAMES
from dpo_fast.models.scoring import forward_arguments
from dpo_fast.training import data_ranks
from dpo_fast.training.parallel_section import ParallelSection
from tests.support.architectures import TREES, make

EXTRAS = ("entropy", "is_top1")
# One answer of one token: a row of two. On four ranks two of the slices hold nothing but filling.
FEW = [([5], [[6, 2]])]


def compare_slices(cases: dict[str, dict], tolerance: float) -> None:
    """For models of tests/support/architectures.py. cases: changed sizes, by name.

    The plain llama is tried in every layout, and with next to nothing in a row; the others where most is
    shared. A case may have a name in brackets behind the architecture's. tolerance: of the largest element.
    """
    data_ranks.join(ParallelSection(sequence_parallel=dist.get_world_size()))
    group = data_ranks.sequence_group()
    for name, sizes in cases.items():
        model = make(name.split(" [")[0], NAMES["sdpa"], **sizes)
        for module in model.modules():  # rows of another number are multiplied in another order
            if hasattr(module, "experts_implementation"):
                module.experts_implementation = "eager"
        scoring = ScoringModel(model)
        layouts, rows = (
            (LAYOUTS, (TREES, FEW, [])) if name == "llama" else (["shared_prefix"], (TREES,))
        )
        for layout, trees in product(layouts, rows):
            batch = collate_trees(trees, layout)
            compare(scoring, batch, group, tolerance, f"{name}, {layout}, {len(trees)} trees")


def compare(scoring: ScoringModel, batch: ScoredBatch, group, tolerance: float, what: str) -> None:
    """Raises AssertionError. The whole row is scored as `layout` has it, with no group."""
    shared, gradients = scored(scoring, batch, group)
    # A padded batch has no plan; in one row, it stands as `cut` lays it out.
    spans = batch.spans or ((batch.input_ids.shape[1], 0, -1),) * len(batch.input_ids)
    whole, truth = scored(scoring, batch, None, spans)
    for name, values in whole.items():
        assert shared[name].dtype == values.dtype and shared[name].shape == values.shape, what
        if len(values):
            error = (shared[name].float() - values.float()).abs().max().item()
            limit = tolerance * max(values.float().abs().max().item(), 1)
            assert error <= limit, f"{what}: {name} is off by {error:.2e}"
        every = [torch.empty_like(shared[name]) for _ in range(group.size)]
        dist.all_gather(every, shared[name])
        assert all(torch.equal(each, every[0]) for each in every), f"{what}: {name} by rank"
    assert gradients.keys() == truth.keys()
    largest = max(each.abs().max().item() for each in truth.values())
    for name, gradient in gradients.items():
        dist.all_reduce(gradient)
        error = (gradient - truth[name]).abs().max().item()
        size = max(truth[name].abs().max().item(), 1e-3 * largest)
        assert error <= tolerance * size, (
            f"{what}: the gradient of {name} is off by {error / max(size, 1e-30):.2e} of its maximum"
        )


def scored(scoring: ScoringModel, batch: ScoredBatch, group, spans=None) -> tuple[dict, dict]:
    """Token outputs, and the gradients of a weighted sum of the log-probs that is the same on all ranks."""
    scoring.group = group
    scoring.zero_grad(set_to_none=True)
    arguments = forward_arguments(batch)
    if spans is not None:
        one_row = {name: arguments[name].reshape(1, -1) for name in ("input_ids", "position_ids")}
        arguments |= one_row | {"spans": spans, "attention_mask": None}
    outputs = scoring(**arguments, extras=EXTRAS)
    T = len(outputs["logp"])
    weights_T = torch.linspace(-1, 1, max(T, 1))[:T] + 0.3
    (outputs["logp"] * weights_T).sum().backward()
    gradients = {
        name: torch.zeros_like(each) if each.grad is None else each.grad.detach().clone()
        for name, each in scoring.named_parameters()
    }
    return {name: each.detach() for name, each in outputs.items()}, gradients
