"""Sums of matrix products that are rounded once: fp32 between the terms."""

from __future__ import annotations

import torch
from torch import Tensor


def product_fp32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in fp32 from operands of 16 or 32 bits."""
    if a.dtype == torch.float32:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()  # products on a CPU have no fp32 output for 16-bit inputs


class ProductSum:
    """out = sum of a_i @ b_i over a known number of terms.

    A single term goes to `out` directly, and so do all terms in fp32. Otherwise an fp32 sum is held
    until the last term. With `residual` the sum lives in `out` and in a second tensor of its dtype
    that holds what rounding took away (16 bits of mantissa for bf16): half the memory, one more
    pass over the sum per term.
    """

    def __init__(self, out: Tensor, terms: int, residual: bool = False):
        self.out, self.terms, self.seen, self.total, self.rest = out, terms, 0, None, None
        self.residual = residual and out.dtype != torch.float32

    def add(self, a: Tensor, b: Tensor) -> None:
        self.seen += 1
        if self.terms == 1:
            torch.mm(a, b, out=self.out)
        elif self.out.dtype == torch.float32:
            torch.mm(a, b, out=self.out) if self.seen == 1 else self.out.addmm_(a, b)
        elif self.residual:
            total = product_fp32(a, b)
            if self.seen > 1:
                total += self.out
                total += self.rest
            self.out.copy_(total)
            if self.seen < self.terms:
                self.rest = torch.empty_like(self.out) if self.rest is None else self.rest
                self.rest.copy_(total.sub_(self.out))
        else:
            self._add_fp32(a, b)

    def _add_fp32(self, a: Tensor, b: Tensor) -> None:
        if self.total is None:
            self.total = product_fp32(a, b)
        elif a.is_cuda:
            torch.addmm(self.total, a, b, out_dtype=torch.float32, out=self.total)
        else:
            self.total += product_fp32(a, b)
        if self.seen == self.terms:
            self.out.copy_(self.total)
            self.total = None
