"""A second derivative is refused where it is asked for, and nothing before."""

import pytest
import torch

from dpo_fast import FusedLinearPreferenceLoss, linear_logp, logits_logp
from dpo_fast.losses import Objective, Totals, preference

V, D, T = 11, 4, 6
G = torch.Generator().manual_seed(0)
HIDDEN, WEIGHT = torch.randn(T, D, generator=G), torch.randn(V, D, generator=G)
IDS = torch.randint(V, (T,), generator=G)
LENGTHS = torch.tensor([1, 2, 2, 1])


def of_the_head(hidden):
    return linear_logp(hidden, WEIGHT, IDS).logp.sum()


def of_logits(hidden):
    return logits_logp(hidden @ WEIGHT.t(), IDS).sum()


def of_the_kernel(hidden):
    logp, totals = hidden.sum(1) - 9, Totals(2, 3)
    return preference(
        logp, LENGTHS, torch.zeros(4), Objective(), totals, implementation="triton"
    ).loss


def of_a_module(hidden):
    return FusedLinearPreferenceLoss("simpo")(hidden, WEIGHT, IDS, lengths=LENGTHS)[0]


def of_compiled_code(hidden):
    return torch.compile(of_the_head, backend="eager")(hidden)


LOSSES = (of_the_head, of_logits, of_the_kernel, of_a_module, of_compiled_code)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_penalty_on_gradients_is_refused(loss):
    """PyTorch's own decorator would give gradients that are constants here, and the penalty nothing."""
    hidden = HIDDEN.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(hidden), hidden)
    value = loss(hidden)
    (gradient,) = torch.autograd.grad(value, hidden, create_graph=True)
    assert torch.equal(gradient, expected)
    with pytest.raises(RuntimeError, match="of dpo_fast has no second derivative"):
        (value + gradient.square().sum()).backward()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int32], ids=str)
def test_dtypes_without_products_are_refused(dtype):
    hidden, weight = HIDDEN.to(dtype), WEIGHT.to(dtype)
    with pytest.raises(ValueError, match=f"hidden is {dtype}; expected torch.float32, bfloat16"):
        linear_logp(hidden, weight, IDS)
    with pytest.raises(ValueError, match=f"logits are {dtype}; expected torch.float32, bfloat16"):
        logits_logp((HIDDEN @ WEIGHT.t()).to(dtype), IDS)
