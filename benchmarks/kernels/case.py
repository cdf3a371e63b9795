"""What one row of the table is about, what a contender is, and what an operation is.

Inputs of the benchmarks: logits that look like a language model's.

Uniform logits flatter gradient filters (nothing to drop, or everything) and zeros flatter clocks.
Here the vocabulary follows Zipf's law (the logit of rank r is -ln r plus noise of standard deviation
1.5), and each target is lifted to stand LIFT +- 3 above the log-sum of all the rest. With the head of
Qwen2.5-0.5B that gives, in fp32: mean log-prob -1.2, median -0.6, a tenth below -3.4, four targets in
five the argmax, entropy 3.3 nats, 0.1 % of the probabilities above 2^-12, logits of standard
deviation 2.4.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.cli import Package
from benchmarks.machine import DTYPES

MODES = ("logps", "frozen", "trainable")


@dataclass(frozen=True)
class Case:
    """One cell of the table.

    mode: `logps` (forward, nothing differentiable), `frozen` (forward and backward, gradient of the
        hidden states alone) or `trainable` (forward and backward, every gradient).
    """

    op: str
    mode: str
    T: int
    D: int
    V: int
    dtype: str
    device: str

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def itemsize(self) -> int:
        return self.torch_dtype.itemsize

    def __str__(self) -> str:
        sizes = " ".join(f"{n}={getattr(self, n)}" for n in "TDV" if getattr(self, n))
        return f"{self.op} {sizes} {self.dtype} on {self.device}"


class Outputs(NamedTuple):
    """What a contender computed: log-probs summed over T / len(values) consecutive tokens each
    (1 for most, a completion for Liger's DPO, all of them for a cross-entropy), gradients, and the
    name and the number of products of the schedule, where the contender tells."""

    values: Tensor
    gradients: tuple[Tensor, ...] = ()
    schedule: str = ""
    products: float | None = None


@dataclass(frozen=True)
class Contender:
    """One implementation of an operation.

    build: (case, inputs) -> a function of no arguments that runs once and returns `Outputs`. With
        gradients, if the mode has any.
    ours: held to the tight gate, and an exception in it fails the run; a peer's is told and its
        row left out.
    slopes: what its gradients are of: `token` (any slope per token, which is what DPO needs),
        `equal` (minus the sum of all log-probs: a plain cross-entropy) or `pairs` (the DPO loss itself).
    exact: its logits are fp32 whatever the inputs (the tight gate is about this).
    obstacle: (case) -> why it cannot run this case, or None.
    spare: (case) -> True leaves it out unless --only has its name: another one stands for it, or it would
        add minutes and tell little.
    compiled: its first call at a shape compiles.
    growth: it stands in the curves against T.
    """

    name: str
    build: Callable[[Case, NamedTuple], Callable[[], Outputs]]
    ours: bool = False
    exact: bool = False
    modes: tuple[str, ...] = MODES
    devices: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[str, ...] = tuple(DTYPES)
    slopes: str = "token"
    package: Package | None = None
    obstacle: Callable[[Case], str | None] = lambda case: None
    spare: Callable[[Case], bool] = lambda case: False
    compiled: bool = False
    growth: bool = True

    def why_not(self, case: Case) -> str | None:
        """Why this contender cannot run this case, in one line; None if it can."""
        missing = self.package.missing() if self.package else None
        if case.device not in self.devices:
            reason = f"needs a {' or '.join(self.devices)} device: it has no {case.device} kernels"
            return f"{reason}; and {missing}" if missing else reason
        if missing:
            return missing
        if case.dtype not in self.dtypes:
            return f"takes {' or '.join(self.dtypes)}, not {case.dtype}"
        return self.obstacle(case)


@dataclass(frozen=True)
class Operation:
    """An operation that is measured, and everything that is particular to it.

    sizes: which of T, D and V it has.
    dtypes: those of its inputs, if they are not the head's: log-probs are fp32 whatever that is.
    gradients: by mode, the names of the inputs whose gradients are computed, in order.
    least: by mode, the matrix products that no implementation can do without.
    inputs: (case, seed) -> a NamedTuple of tensors with `targets` and `slopes`.
    truth: (inputs) -> an object with `logp` [T] and `gradients(slopes, names)`.
    products: (case, inputs) -> the bare matrix products by name, as functions to time.
    needed: (case, products) -> how many times each bare product stands in that many products.
    work: (case, products) -> flops, and bytes that must move at least once.
    """

    name: str
    contenders: tuple[Contender, ...]
    sizes: str
    dtypes: tuple[str, ...] | None
    gradients: dict[str, tuple[str, ...]]
    least: dict[str, float]
    inputs: Callable
    truth: Callable
    products: Callable
    needed: Callable
    work: Callable

    @property
    def modes(self) -> tuple[str, ...]:
        return tuple(self.gradients)


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
