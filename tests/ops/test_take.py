"""Rows by index against PyTorch's own."""

import pytest
import torch

from dpo_fast.ops.take import take

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_cuda)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(40,), (40, 3)])
def test_values_and_gradients_are_those_of_indexing(shape, device):
    torch.manual_seed(0)
    values = torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)
    index = torch.randint(40, (300,), device=device)
    slope = torch.randn(300, *shape[1:], dtype=torch.float64, device=device)
    taken = take(values, index)
    assert torch.equal(taken, values[index])
    (found,) = torch.autograd.grad((taken * slope).sum(), values)
    (true,) = torch.autograd.grad((values[index] * slope).sum(), values)
    torch.testing.assert_close(found, true)
    assert take(values, index[:0]).shape == (0, *shape[1:])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(7,), (7, 64)])
def test_gradients_are_the_same_every_time(shape, device):
    """Sums of many terms of very unequal size show any other order of adding."""
    torch.manual_seed(0)
    values = torch.randn(shape, device=device, requires_grad=True)
    index = torch.randint(7, (200_000,), device=device)
    slope = torch.randn(len(index), *shape[1:], device=device).exp() ** 4
    found = [torch.autograd.grad(take(values, index), values, slope)[0] for _ in range(5)]
    assert all(torch.equal(each, found[0]) for each in found)
