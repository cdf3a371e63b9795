"""Inputs of the benchmarks: logits that look like a language model's.

Uniform logits flatter gradient filters (nothing to drop, or everything) and zeros flatter clocks.
Here the vocabulary follows Zipf's law (the logit of rank r is -ln r plus noise of standard deviation
1.5), and each target is lifted to stand LIFT +- 3 above the log-sum of all the rest. With the head of
Qwen2.5-0.5B that gives, in fp32: mean log-prob -1.2, median -0.6, a tenth below -3.4, four targets in
five the argmax, entropy 3.3 nats, 0.1 % of the probabilities above 2^-12, logits of standard
deviation 2.4.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

NOISE = 1.5
LIFT, LIFT_SPREAD = 1.5, 3.0


class HeadInputs(NamedTuple):
    """Hidden [T, D] and weight [V, D] (both leaves), targets [T], upstream slopes dL/dlogp [T]."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    slopes: Tensor


class LogitsInputs(NamedTuple):
    """Logits [T, V] (a leaf), targets [T], upstream slopes dL/dlogp [T]."""

    logits: Tensor
    targets: Tensor
    slopes: Tensor


def head_inputs(
    T: int, D: int, V: int, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0
) -> HeadInputs:
    """Hidden states that all share one direction, which carries the Zipf term of every row of the
    weight; each leans towards its target's row as far as its lift asks."""
    generator = torch.Generator(device).manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=generator, device=device)  # noqa: E731
    targets, zipf_V = _zipf(T, V, generator, device)
    shared_D = normal(D).sign()
    weight = normal(V, D).mul_(NOISE / D**0.5)
    noise_TD = weight[targets]
    weight.addcmul_(zipf_V[:, None], shared_D, value=1 / D)
    hidden = normal(T, D).add_(shared_D)
    missing_T = _wanted(zipf_V, normal(T)) - (hidden * weight[targets]).sum(-1)
    hidden.addcmul_(noise_TD, (missing_T / noise_TD.square().sum(-1))[:, None])
    leaves = (x.to(dtype).requires_grad_() for x in (hidden, weight))
    return HeadInputs(*leaves, targets, normal(T))


def logits_inputs(
    T: int, V: int, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0
) -> LogitsInputs:
    """The same law for logits that exist already."""
    generator = torch.Generator(device).manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=generator, device=device)  # noqa: E731
    targets, zipf_V = _zipf(T, V, generator, device)
    logits = normal(T, V).mul_(NOISE).add_(zipf_V)
    logits[torch.arange(T, device=device), targets] = _wanted(zipf_V, normal(T))
    return LogitsInputs(logits.to(dtype).requires_grad_(), targets, normal(T))


def _zipf(T: int, V: int, generator, device) -> tuple[Tensor, Tensor]:
    """Targets drawn with probability 1/rank, and -ln rank of every word."""
    zipf_V = -torch.arange(1, V + 1, dtype=torch.float64, device=device).log()
    targets = torch.multinomial(zipf_V.exp(), T, replacement=True, generator=generator)
    return targets, zipf_V.float()


def _wanted(zipf_V: Tensor, normal_T: Tensor) -> Tensor:
    """Logits of the targets: LIFT +- LIFT_SPREAD above the log-sum of the rest."""
    rest = zipf_V.double().logsumexp(0).float() + NOISE**2 / 2
    return rest + LIFT + LIFT_SPREAD * normal_T
