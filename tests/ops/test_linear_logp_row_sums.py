"""Sums of products are rounded once, however many terms they have."""

from functools import partial

import pytest
import torch

from dpo_fast.ops.linear_logp.row_sums import ProductSum
from tests.support.device import DEVICE

pytestmark = pytest.mark.usefixtures("on_the_device")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("residual", [False, True])
def test_many_terms_are_rounded_once(dtype, residual):
    """64 terms whose sum is 64 times each: summed in 16 bits the last ones would vanish."""
    rand = partial(torch.rand, generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    terms = [(rand(5, 8).to(DEVICE, dtype), rand(8, 7).to(DEVICE, dtype)) for _ in range(64)]
    out = torch.full((5, 7), torch.nan, dtype=dtype)
    total = ProductSum(out, 64, residual)
    for a, b in terms:
        total.add(a, b)
    truth = sum(a.double() @ b.double() for a, b in terms)
    # Half a unit in the last place of the output, and a little for the 16 + bits of the sum.
    allowed = 0.51 * torch.finfo(dtype).eps if dtype != torch.float32 else 1e-6
    assert ((out.double() - truth).abs() <= allowed * 2 * truth).all()
    naive = torch.zeros(5, 7, dtype=dtype)
    for a, b in terms:
        naive += a @ b
    if dtype == torch.bfloat16:
        worst = ((out.double() - truth).abs() / truth).max()
        assert ((naive.double() - truth).abs() / truth).max() > 3 * worst


def test_a_single_term_needs_nothing():
    out = torch.empty(3, 4, dtype=torch.bfloat16)
    a, b = torch.randn(3, 8).bfloat16(), torch.randn(8, 4).bfloat16()
    total = ProductSum(out, 1)
    total.add(a, b)
    assert torch.equal(out, a @ b) and total.total is None
