"""Rows times a factor each, rounded once."""

import pytest
import torch

from tests.support.device import DEVICE, needs_triton

pytestmark = needs_triton


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (5, 1500), (7, 33)], ids=str)
def test_rounded_once(shape, given, stored):
    from dpo_fast.kernels.scale_rows import scale_rows

    g = torch.Generator("cpu").manual_seed(0)
    x = torch.randn(shape, generator=g).to(DEVICE, given)
    total = (1 + torch.rand(shape[0], generator=g)).to(DEVICE)
    slope = torch.randn(shape[0], generator=g).to(DEVICE)
    for given_slope in (None, slope):
        out = torch.full(shape, torch.nan, device=DEVICE, dtype=stored)
        scale_rows(x, total, out, factor=-0.7, slope_T=given_slope)
        truth = -0.7 * x.double() / total.double()[:, None]
        if given_slope is not None:
            truth *= slope.double()[:, None]
        # Half a unit in the last place, and the rounding of the factor.
        slack = torch.finfo(stored).eps / 2 + 4e-7
        torch.testing.assert_close(out.double(), truth, rtol=slack, atol=1e-7)


def test_strides():
    from dpo_fast.kernels.scale_rows import scale_rows

    x = torch.arange(24.0, device=DEVICE).view(4, 6)
    total, out = torch.full((6,), 2.0, device=DEVICE), torch.zeros(6, 8, device=DEVICE)
    scale_rows(x.t(), total, out[:, :4], factor=2.0)
    assert torch.equal(out[:, :4], x.t()) and (out[:, 4:] == 0).all()
