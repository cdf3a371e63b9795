"""What one call of the head is made of, and the checks on it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dpo_fast.ops.linear_logp.plan import HeadPlan
from dpo_fast.ops.linear_logp.vocab_shard import VocabShard

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OF_DTYPES = "torch.float32, bfloat16, float16 or float64"
EXTRAS = ("entropy", "log_sum_p2", "mean_logit", "is_top1")


@dataclass(frozen=True)
class HeadOptions:
    """z = cap(logit_scale * (h W^T + b)) / temperature, cap(y) = softcap * tanh(y / softcap)."""

    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.logit_scale) or self.logit_scale == 0:
            raise ValueError(f"logit_scale={self.logit_scale} must be finite and not 0")
        for name in ("softcap", "temperature"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}={value} must be finite and greater than 0")

    @property
    def factor(self) -> float:
        """dz / d(h.w), without the slope of the soft cap."""
        return self.logit_scale / self.temperature


@dataclass(frozen=True)
class HeadCall:
    """One call of the head, as a schedule sees it.

    hidden_TD: [T, D].
    weight_VD: [V, D]; with a shard, this rank's rows.
    targets_T: int64 [T]; with a shard, counted from its first row. Outside 0..V-1 another shard has it.
    bias: [V] or None.
    options: the head's scale, soft cap and temperature.
    plan: the products and what is kept.
    shard: None for a whole head.
    """

    hidden_TD: Tensor
    weight_VD: Tensor
    targets_T: Tensor
    bias: Tensor | None
    options: HeadOptions
    plan: HeadPlan
    shard: VocabShard | None = None

    @property
    def vocabulary(self) -> int:
        """Columns of the whole head."""
        return self.weight_VD.shape[0] if self.shard is None else self.shard.vocab


def check_call(
    hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, bias: Tensor | None, extras: tuple
) -> None:
    """Raises ValueError for shapes, dtypes, devices or extras that do not fit."""
    shapes = f"hidden {tuple(hidden_TD.shape)}, weight {tuple(weight_VD.shape)}, targets " + str(
        tuple(targets_T.shape)
    )
    fits = hidden_TD.dim() == 2 and weight_VD.dim() == 2 and targets_T.dim() == 1
    if not fits or hidden_TD.shape != (targets_T.shape[0], weight_VD.shape[1]):
        raise ValueError(f"expected hidden [T, D], weight [V, D] and targets [T]; got {shapes}")
    if weight_VD.shape[0] == 0 or weight_VD.shape[1] == 0:
        raise ValueError(f"the head is empty: {shapes}")
    if hidden_TD.dtype not in DTYPES:
        raise ValueError(f"hidden is {hidden_TD.dtype}; expected {OF_DTYPES}")
    if hidden_TD.dtype != weight_VD.dtype:
        raise ValueError(
            f"hidden is {hidden_TD.dtype} and weight is {weight_VD.dtype}: both must have the same "
            "floating dtype; cast one, or run under torch.autocast"
        )
    if bias is not None and (bias.shape != weight_VD.shape[:1] or bias.dtype != weight_VD.dtype):
        raise ValueError(
            f"bias is {bias.dtype} {tuple(bias.shape)}; expected {weight_VD.dtype} "
            f"({weight_VD.shape[0]},)"
        )
    devices = {str(x.device) for x in (hidden_TD, weight_VD, targets_T, bias) if x is not None}
    if len(devices) > 1:
        raise ValueError(f"tensors are on different devices: {sorted(devices)}")
    unknown = [name for name in extras if name not in EXTRAS]
    if unknown or len(set(extras)) != len(extras):
        raise ValueError(f"extras={tuple(extras)}: choose from {EXTRAS}, each at most once")


def check_targets(targets_T: Tensor, V: int) -> None:
    """Raises for targets outside 0..V-1, which would read foreign memory. Waits for nothing on a GPU."""
    inside = ((targets_T >= 0) & (targets_T < V)).all()
    message = f"targets must be in 0..{V - 1}: drop rows to be ignored before the head"
    if targets_T.device.type == "cuda":
        torch._assert_async(inside, message)
    elif not inside:
        wrong = targets_T[(targets_T < 0) | (targets_T >= V)][0].item()
        raise ValueError(f"{message}; got {wrong}")
