"""No speed without correctness: how far a contender may be off before its time is not printed.

max_err       worst gradient element's error, relative to the largest element of that gradient (the
              worst of the gradients; of the log-probs where a mode has no gradient)
err_logp      worst log-prob's error in nats, per token where a contender returns sums
err_sequence  worst error of the sum over SEQUENCE consecutive tokens, in nats

`exact` is for contenders whose logits are fp32; `rounded` for those that round logits to the inputs'
dtype, which bounds nothing better. With fp32 inputs both are the same thing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.kernels.case import Contender, Outputs

SEQUENCE = 2048  # tokens, the length of the target's statement about sums


class Gate(NamedTuple):
    gradient: float
    logp: float


GATES = {
    ("exact", "fp32"): Gate(1e-4, 2e-4),
    ("exact", "bf16"): Gate(1e-2, 2e-3),
    ("exact", "fp16"): Gate(1e-2, 2e-3),
    ("rounded", "fp32"): Gate(1e-4, 2e-4),
    ("rounded", "bf16"): Gate(1e-1, 3e-1),  # half a unit in the last place of a logit of 32: 0.06
    ("rounded", "fp16"): Gate(2e-2, 4e-2),
}


class Errors(NamedTuple):
    max_err: float
    err_logp: float
    err_sequence: float | None

    def verdict(self, contender: Contender, dtype: str) -> str | None:
        """What is above its gate, or None. NaN is above every gate."""
        gate = GATES["exact" if contender.exact else "rounded", dtype]
        if not self.max_err <= gate.gradient:
            return f"wrong: max_err {self.max_err:.1e} is above its gate of {gate.gradient:.0e}"
        if not self.err_logp <= gate.logp:
            return f"wrong: err_logp {self.err_logp:.1e} is above its gate of {gate.logp:.0e} nats"
        return None


def compare(outputs: Outputs, logp_T: Tensor, gradients: list[Tensor]) -> Errors:
    """Errors of a contender against the truth's log-probs and gradients."""
    values = outputs.values.detach().to(logp_T.dtype).reshape(-1)
    tokens = len(logp_T) // len(values)  # that each value sums over
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
    """Row chunk by row chunk: a whole difference in the truth's precision may not fit."""
    rows = max(1, (1 << 26) // max(1, truth[0].numel()))
    pairs = zip(gradient.split(rows), truth.split(rows), strict=True)
    worst = torch.stack([(g.to(t.dtype) - t).abs().max() for g, t in pairs]).max()
    return (worst / truth.abs().max()).item()
