"""Optimisers that leave out a step whose gradient is not finite, where DeepSpeed does not look at it."""

from __future__ import annotations

import torch
from torch import Tensor


class FiniteStep:
    """Makes an optimiser leave out a step whose gradient is not finite. A fused one decides on its device.

    For ZeRO 0 in fp32, where all ranks have the whole gradient.

    clipped: whether DeepSpeed clips, and leaves the norm before it in `norm`.
    norm: of the last gradient, [] fp32.
    limit: after so many such steps in a row it takes none any more.
    skipped: whether the last step was left out, [] bool.
    """

    clipped: bool = False
    norm: Tensor | None = None
    limit: int = 1
    skipped: Tensor | None = None

    @torch.no_grad()
    def step(self, closure=None):
        if not self.clipped:
            parameters = [p for group in self.param_groups for p in group["params"]]
            self.norm = torch.nn.utils.get_total_norm(
                [p.grad for p in parameters if p.grad is not None]
            )
        found = ~self.norm.isfinite()
        if self.skipped is None:
            self._in_a_row = torch.zeros((), device=found.device)
            self._ended = torch.zeros_like(found)
        self._in_a_row = (self._in_a_row + 1) * found
        self.skipped = found | self._ended
        self._ended = self._ended | (self._in_a_row >= self.limit)
        if self.defaults.get("fused"):
            self.found_inf = self.skipped.float()
            super().step()
        elif not self.skipped:
            super().step()


class FiniteAdamW(FiniteStep, torch.optim.AdamW):
    """torch's AdamW that leaves such a step out."""
