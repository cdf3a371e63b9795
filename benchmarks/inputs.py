"""Inputs of the benchmarks: logits that look like a language model's."""

from __future__ import annotations

import torch


def head_inputs(T: int, D: int, V: int, dtype: torch.dtype, seed: int = 0):
    """Hidden [T, D], weight [V, D] (both require grad), targets [T] and upstream slopes [T].

    Targets follow a Zipf-like law and are likely: hidden states lean towards their target's row.
    Logits have a standard deviation of about 2, target logits lie about 8 above.
    """
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(V, D, generator=generator) * (2 / D**0.5)
    ranks = torch.arange(1, V + 1, dtype=torch.float64)
    targets = torch.multinomial(1 / ranks, T, replacement=True, generator=generator)
    lean = weight[targets] / weight[targets].square().sum(-1, keepdim=True)
    hidden = torch.randn(T, D, generator=generator) + 8 * lean
    slopes = torch.randn(T, generator=generator)
    leaves = (x.to(dtype).requires_grad_() for x in (hidden, weight))
    return *leaves, targets, slopes
