"""What a row is about: a case, a setting, its inputs, a contender, an operation.

The inputs make logits that look like a language model's. Uniform logits would flatter gradient filters
(nothing to drop, or everything), and zeros would flatter clocks. Here the vocabulary follows Zipf's law:
the logit of rank r is -ln r plus noise of standard deviation 1.5. Each target is lifted to 1.5 +- 3 above
the log-sum of the rest. With the head of Qwen2.5-0.5B that gives, in fp32: mean log-prob -1.2, median -0.6,
a tenth below -3.4, four targets in five the argmax, entropy 3.3 nats, 0.1 % of the probabilities above
2^-12, logits of standard deviation 2.4.
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
NOISE = 1.5  # standard deviation of a logit beside its Zipf term
LIFT, LIFT_SPREAD = 1.5, 3.0  # of a target above the log-sum of the rest: mean, standard deviation


@dataclass(frozen=True)
class Case:
    """One operation in one mode, at one size and dtype.

    mode: `logps` (forward, nothing differentiable), `frozen` (forward and backward, gradient of the
        hidden states alone) or `trainable` (forward and backward, every gradient).
    D, V: 0 for an operation without them.
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


@dataclass(frozen=True)
class Setting:
    """What is measured together. growth: for a curve against T, with the contenders that stand in it."""

    op: str
    T: int
    D: int
    V: int
    dtype: str
    device: str
    modes: tuple[str, ...]
    growth: bool = False

    def case(self, mode: str) -> Case:
        return Case(self.op, mode, self.T, self.D, self.V, self.dtype, self.device)

    @property
    def sizes(self) -> tuple:
        """What it shares with the same sizes in other modes."""
        return self.op, self.T, self.D, self.V, self.dtype, self.device

    def __str__(self) -> str:
        return f"{self.case(self.modes[0])}: {', '.join(self.modes)}"


class Outputs(NamedTuple):
    """What a contender computed.

    values: log-probs, each summed over T / len(values) consecutive tokens: one token for most, a
        completion for Liger's DPO, all of them for a cross-entropy.
    gradients: of the inputs that the operation names for the mode, in its order.
    schedule, products: name and number of products of the schedule, if the contender reports them.
    """

    values: Tensor
    gradients: tuple[Tensor, ...] = ()
    schedule: str = ""
    products: float | None = None


@dataclass(frozen=True)
class Contender:
    """One implementation of an operation.

    build: (case, inputs) -> a function without arguments that runs once and returns `Outputs`, with
        gradients if the mode has any.
    ours: an exception fails the run. A peer's exception becomes the note of its row.
    exact: its logits are fp32 whatever the inputs' dtype, so the tight gate holds for it.
    slopes: what its gradients are of: `token` (any slope per token, as DPO needs), `equal` (minus the
        sum of all log-probs, a plain cross-entropy) or `pairs` (the DPO loss itself).
    obstacle: (case) -> why it cannot run this case, or None.
    spare: (case) -> True to leave it out unless --only has its name. Another contender stands for it, or
        it would add minutes and show little.
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
    dtypes: the only dtypes of its inputs; None for those that were asked for.
    gradients: by mode, the names of the inputs whose gradients are computed, in order.
    least: by mode, the matrix products that every implementation has to do.
    inputs: (case, seed) -> a NamedTuple of tensors with `targets` and `slopes`.
    truth: (inputs) -> an object with `logp` [T] and `gradients(kind, slopes, names)`.
    products: (case, inputs) -> the bare matrix products by name, as functions to time.
    needed: (case, count) -> how often each bare product stands in a schedule of `count` products.
    work: (case, count) -> flops of `count` products, and bytes that must move at least once.
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


class HeadInputs(NamedTuple):
    """Hidden [T, D] and weight [V, D], both leaves; targets [T]; upstream slopes dL/dlogp [T]."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    slopes: Tensor


class LogitsInputs(NamedTuple):
    """Logits [T, V], a leaf; targets [T]; upstream slopes dL/dlogp [T]."""

    logits: Tensor
    targets: Tensor
    slopes: Tensor


def head_inputs(
    T: int, D: int, V: int, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0
) -> HeadInputs:
    """Inputs of a loss head.

    All hidden states share one direction, in which the weight's rows carry their Zipf terms. Each also
    leans towards its target's row, as far as its lift asks.
    """
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
    """Logits by the same law."""
    generator = torch.Generator(device).manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=generator, device=device)  # noqa: E731
    targets, zipf_V = _zipf(T, V, generator, device)
    logits = normal(T, V).mul_(NOISE).add_(zipf_V)
    logits[torch.arange(T, device=device), targets] = _wanted(zipf_V, normal(T))
    return LogitsInputs(logits.to(dtype).requires_grad_(), targets, normal(T))


def _zipf(T: int, V: int, generator, device) -> tuple[Tensor, Tensor]:
    """Targets drawn with probability proportional to 1 / rank, and -ln rank of every word."""
    zipf_V = -torch.arange(1, V + 1, dtype=torch.float64, device=device).log()
    targets = torch.multinomial(zipf_V.exp(), T, replacement=True, generator=generator)
    return targets, zipf_V.float()


def _wanted(zipf_V: Tensor, normal_T: Tensor) -> Tensor:
    """Logits of the targets: LIFT +- LIFT_SPREAD above the log-sum of the rest."""
    rest = zipf_V.double().logsumexp(0).float() + NOISE**2 / 2
    return rest + LIFT + LIFT_SPREAD * normal_T
