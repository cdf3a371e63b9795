"""No speed without correctness: the truth, and how far a contender may be off before it has no time.

The truth is log-probs and gradients in fp64 for fp32 inputs, and in fp32 for 16-bit inputs, whose own
rounding is ten thousand times coarser. Plain PyTorch computes it in chunks of tokens, without a line of the
code under test.

max_err       worst gradient element, relative to the largest element of its gradient; over all gradients
              (of the log-probs in a mode without gradients)
err_logp      worst log-prob in nats, per token if a contender returns sums
err_sequence  worst sum over SEQUENCE consecutive tokens, in nats
"""

from __future__ import annotations

import abc
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.kernels.case import Contender, Outputs

CHUNK_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}  # of logits that exist at a time
SEQUENCE = 2048  # tokens


class Gate(NamedTuple):
    gradient: float
    logp: float


GATES = {  # exact: logits in fp32; rounded: to the inputs' dtype, which in fp32 is the same
    ("exact", "fp32"): Gate(1e-4, 2e-4),
    ("exact", "bf16"): Gate(1e-2, 2e-3),
    ("exact", "fp16"): Gate(1e-2, 2e-3),
    ("rounded", "fp32"): Gate(1e-4, 2e-4),
    ("rounded", "bf16"): Gate(1e-1, 3e-1),  # half a unit in the last place of a logit of 32: 0.06
    ("rounded", "fp16"): Gate(2e-2, 4e-2),
}


def precision(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float32 else torch.float32


class _Truth(abc.ABC):
    """Log-probs and gradients of an operation.

    logp: [T], computed at once. Gradients are computed when asked for, and kept until other slopes come.
    """

    def __init__(self, targets: Tensor, V: int, dtype: torch.dtype):
        self.targets, self.V, self.dtype = targets, V, dtype
        self._kind, self._kept = None, {}
        with torch.no_grad():
            parts = [self._forward(rows) for rows in self._chunks()]
        self.logp, self.lse = (torch.cat(column) for column in zip(*parts))

    @abc.abstractmethod
    def logits(self, rows: slice) -> Tensor: ...

    def gradients(self, kind: str, slopes: Tensor, names: tuple[str, ...]) -> dict[str, Tensor]:
        """Gradients of sum_t slopes_t * logp_t, by input. kind: a name for the slopes, to keep them by."""
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
    """The truth of logits z = h W^T. dtype: of its arithmetic; None for `precision`."""

    def __init__(self, inputs, dtype: torch.dtype | None = None):
        self.hidden, self.weight = inputs.hidden.detach(), inputs.weight.detach()
        dtype = dtype or precision(self.weight.dtype)
        self.precise = self.weight.to(dtype)
        super().__init__(inputs.targets, *self.weight.shape[:1], dtype)

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
    """The truth of given logits."""

    def __init__(self, inputs):
        self.given = inputs.logits.detach()
        super().__init__(inputs.targets, self.given.shape[1], precision(self.given.dtype))

    def logits(self, rows: slice) -> Tensor:
        return self.given[rows].to(self.dtype)

    def _backward(self, slopes: Tensor, names: tuple[str, ...]) -> dict[str, Tensor]:
        return {"logits": torch.cat([self._slope(rows, slopes) for rows in self._chunks()])}


class Errors(NamedTuple):
    max_err: float
    err_logp: float
    err_sequence: float | None

    def above_gate(self, contender: Contender, dtype: str) -> str | None:
        """Which error is above its gate, None if none is. NaN is above every gate."""
        gate = GATES["exact" if contender.exact else "rounded", dtype]
        if not self.max_err <= gate.gradient:
            return f"wrong: max_err {self.max_err:.1e} is above its gate of {gate.gradient:.0e}"
        if not self.err_logp <= gate.logp:
            return f"wrong: err_logp {self.err_logp:.1e} is above its gate of {gate.logp:.0e} nats"
        return None


def compare(outputs: Outputs, logp_T: Tensor, gradients: list[Tensor]) -> Errors:
    """Errors of a contender against the truth's log-probs and gradients."""
    values = outputs.values.detach().to(logp_T.dtype).reshape(-1)
    tokens = len(logp_T) // len(values)  # in the sum of each value
    distance = (values - logp_T.view(-1, tokens).sum(-1)).abs()
    err_logp = distance.max().item() / tokens
    sequence = None
    if tokens == 1:
        blocks = (values - logp_T).split(SEQUENCE)
        sequence = max(abs(block.sum().item()) for block in blocks)
    if not gradients:
        largest = logp_T.view(-1, tokens).sum(-1).abs().max()
        return Errors((distance.max() / largest).item(), err_logp, sequence)
    pairs = list(zip(outputs.gradients, gradients, strict=True))
    return Errors(max(_relative(g, t) for g, t in pairs), err_logp, sequence)


def _relative(gradient: Tensor, truth: Tensor) -> float:
    """Largest error over largest element, in chunks of rows: a whole difference may not fit."""
    rows = max(1, (1 << 26) // max(1, truth[0].numel()))
    pairs = zip(gradient.split(rows), truth.split(rows), strict=True)
    worst = torch.stack([(g.to(t.dtype) - t).abs().max() for g, t in pairs]).max()
    return (worst / truth.abs().max()).item()
