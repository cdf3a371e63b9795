"""Ids, lengths and counts of any integer dtype: the same as in int64."""

import pytest
import torch

from dpo_fast import FusedLinearPreferenceLoss, PreferenceLoss, linear_logp, logits_logp
from dpo_fast.losses import Objective, ScoredGroups, Totals, preference
from dpo_fast.ops.integers import as_int64

DTYPES = (torch.int32, torch.int16, torch.int8, torch.uint8)
V, D = 11, 4


def operands(*shape):
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(*shape, D, generator=g), torch.randn(V, D, generator=g)
    return hidden, weight, torch.randint(V, shape, generator=g)


def of_operations(dtype):
    hidden, weight, ids = operands(6)
    ids, logits = ids.to(dtype), hidden @ weight.t()
    compiled = torch.compile(linear_logp, backend="eager")
    yield linear_logp(hidden, weight, ids).logp
    yield compiled(hidden, weight, ids).logp
    yield logits_logp(logits, ids)


def of_losses(dtype):
    hidden, weight, ids = operands(4, 3)
    packed, lengths = hidden.flatten(0, 1), torch.tensor([3, 3, 2, 4]).to(dtype)
    logps = -torch.rand(4, generator=torch.Generator().manual_seed(1))
    simpo, grpo = FusedLinearPreferenceLoss("simpo"), FusedLinearPreferenceLoss("grpo")
    yield simpo(hidden, weight, ids.to(dtype), input_ids=ids.to(dtype).roll(1, 1))[0]
    yield simpo(packed, weight, ids.flatten().to(dtype), lengths=lengths)[0]
    places = torch.arange(4).repeat_interleave(3).to(dtype)
    yield simpo(packed, weight, ids.flatten().to(dtype), sequence_ids=places)[0]
    groups = {"scores": torch.arange(4.0), "counts": torch.tensor([2, 2]).to(dtype)}
    old = torch.full((4, 3), -2.0)
    reference = {"reference_hidden": hidden, "reference_weight": weight}
    loss, metrics = grpo(hidden, weight, ids.to(dtype), old_logps=old, **groups, **reference)
    yield from (loss, metrics["rewards/accuracies"])
    yield PreferenceLoss("simpo")(
        *logps.chunk(2), chosen_lengths=lengths[:2], rejected_lengths=lengths[2:]
    )[0]
    tokens = -torch.rand(12, generator=torch.Generator().manual_seed(2))
    yield preference(tokens, lengths, None, Objective(("simpo",)), Totals(2, 6)).loss
    scored = ScoredGroups(groups["scores"], groups["counts"], tokens)
    objective, totals = Objective(("grpo",)), Totals(2, 0, 4, 12)
    yield preference(
        tokens, lengths, None, objective, totals, reference_T=tokens, groups=scored
    ).loss


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("values", [of_operations, of_losses])
def test_the_dtype_changes_nothing(values, dtype):
    for found, expected in zip(values(dtype), values(torch.int64), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16], ids=str)
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(ValueError, match=f"labels are {dtype}; expected torch.int64"):
        as_int64(torch.ones(3, dtype=dtype), "labels")
    hidden, weight, ids = operands(4, 3)
    with pytest.raises(ValueError, match=f"labels are {dtype}; expected torch.int64"):
        FusedLinearPreferenceLoss("simpo")(hidden, weight, ids.to(dtype))
