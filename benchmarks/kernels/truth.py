"""What the contenders are compared with: log-probs and gradients in fp64 (for fp32 inputs) or fp32 (for
16-bit inputs, whose own rounding is ten thousand times coarser). Token chunk by token chunk, in plain
PyTorch, and without a line of the code under test."""

from __future__ import annotations

import abc

import torch
from torch import Tensor

CHUNK_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}  # of logits that exist at a time


def precision(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float32 else torch.float32


class _Truth(abc.ABC):
    """`logp` [T] at once; gradients for given slopes when asked, kept until the next slopes."""

    def __init__(self, targets: Tensor, V: int, dtype: torch.dtype):
        self.targets, self.V, self.dtype = targets, V, precision(dtype)
        self._kind, self._kept = None, {}
        with torch.no_grad():
            parts = [self._forward(rows) for rows in self._chunks()]
        self.logp, self.lse = (torch.cat(column) for column in zip(*parts))

    @abc.abstractmethod
    def logits(self, rows: slice) -> Tensor: ...

    def gradients(self, kind: str, slopes: Tensor, names: tuple[str, ...]) -> dict[str, Tensor]:
        """Gradients of sum slopes * logp by name. `kind` names the slopes, to compute them once."""
        if self._kind != kind:
            self._kind, self._kept = kind, {}  # freed first: a [V, D] in this precision is large
            with torch.no_grad():
                self._kept = self._backward(slopes.to(self.dtype), names)
        return self._kept

    def _chunks(self):
        T = len(self.targets)
        size = max(1, CHUNK_BYTES[self.targets.device.type] // (self.V * self.dtype.itemsize))
        return [slice(i, min(i + size, T)) for i in range(0, T, size)]

    def _forward(self, rows: slice) -> tuple[Tensor, Tensor]:
        z = self.logits(rows)
        lse = z.logsumexp(-1)
        return z.gather(1, self.targets[rows, None]).squeeze(1) - lse, lse

    def _slope(self, rows: slice, slopes: Tensor) -> Tensor:
        """dL/dz of a chunk: c_t (1[v = y_t] - p_tv)."""
        c = slopes[rows, None]
        g = self.logits(rows).sub_(self.lse[rows, None]).exp_().mul_(-c)
        return g.scatter_add_(1, self.targets[rows, None], c)

    @abc.abstractmethod
    def _backward(self, slopes: Tensor, names: tuple[str, ...]) -> dict[str, Tensor]: ...


class HeadTruth(_Truth):
    """Of z = h W^T."""

    def __init__(self, inputs):
        self.hidden, self.weight = inputs.hidden.detach(), inputs.weight.detach()
        self.precise = self.weight.to(precision(self.weight.dtype))
        super().__init__(inputs.targets, *self.weight.shape[:1], self.weight.dtype)

    def logits(self, rows: slice) -> Tensor:
        return self.hidden[rows].to(self.dtype) @ self.precise.t()

    def _backward(self, slopes: Tensor, names: tuple[str, ...]) -> dict[str, Tensor]:
        found = {"hidden": torch.empty_like(self.hidden, dtype=self.dtype)}
        if "weight" in names:
            found["weight"] = torch.zeros_like(self.precise)
        for rows in self._chunks():
            g = self._slope(rows, slopes)
            found["hidden"][rows] = g @ self.precise
            if "weight" in names:
                found["weight"].addmm_(g.t(), self.hidden[rows].to(self.dtype))
        return found


class LogitsTruth(_Truth):
    """Of logits that exist already."""

    def __init__(self, inputs):
        self.given = inputs.logits.detach()
        super().__init__(inputs.targets, self.given.shape[1], self.given.dtype)

    def logits(self, rows: slice) -> Tensor:
        return self.given[rows].to(self.dtype)

    def _backward(self, slopes: Tensor, names: tuple[str, ...]) -> dict[str, Tensor]:
        return {"logits": torch.cat([self._slope(rows, slopes) for rows in self._chunks()])}
