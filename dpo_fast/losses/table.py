"""The table of losses: what each computes per pair, which inputs and options it uses, where it is from.

Per pair: a = lw - rw and b = ll - rl are the log-ratios of chosen and rejected, nw and nl their numbers
of scored tokens, d = a - b the margin, LS the log-sigmoid, eps the label smoothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class PairLogps:
    """Summed completion log-probabilities of P pairs, [P] in fp32; lengths are scored tokens, [P].

    `reference_chosen` and `reference_rejected` are None where no reference is used.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor
    reference_chosen: Tensor | None = None
    reference_rejected: Tensor | None = None

    @property
    def chosen_ratio(self) -> Tensor:
        """a = lw - rw, [P]; lw where there is no reference."""
        reference = self.reference_chosen
        return self.chosen if reference is None else self.chosen - reference

    @property
    def rejected_ratio(self) -> Tensor:
        """b = ll - rl, [P]; ll where there is no reference."""
        reference = self.reference_rejected
        return self.rejected if reference is None else self.rejected - reference

    @property
    def margin(self) -> Tensor:
        return self.chosen_ratio - self.rejected_ratio

    @property
    def length_averaged_margin(self) -> Tensor:
        return self.chosen_ratio / self.chosen_lengths - self.rejected_ratio / self.rejected_lengths


@dataclass(frozen=True)
class LossOptions:
    """Options that losses share. `LossSpec.options` says which loss uses which.

    beta: strength of the pull towards the reference; label_smoothing: probability that a label is
    flipped, 0 <= eps < 0.5; length_average: IPO on mean (True) or summed (False) log-ratios.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    length_average: bool = True

    def __post_init__(self) -> None:
        if not (math.isfinite(self.beta) and self.beta > 0):
            raise ValueError(f"beta={self.beta} must be finite and greater than 0")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(
                f"label_smoothing={self.label_smoothing} must be at least 0 and below 0.5: at 0.5 "
                "the labels say nothing"
            )


@dataclass(frozen=True)
class LossSpec:
    """One row of the table. `normaliser` is what the sum over pairs is divided by, globally; `kernel`
    says whether the Triton kernel of `preference` computes it, under the same name."""

    name: str
    function: Callable[[PairLogps, LossOptions], Tensor]
    formula: str
    source: str
    options: tuple[str, ...]
    needs_reference: bool = True
    normaliser: str = "pairs"
    kernel: bool = False


LOSSES: dict[str, LossSpec] = {}


def _register(formula: str, source: str, options: tuple[str, ...], **columns):
    def add(function):
        name = function.__name__
        LOSSES[name] = LossSpec(name, function, formula, source, options, **columns)
        return function

    return add


def _smoothed(x: Tensor, eps: float) -> Tensor:
    return -(1 - eps) * F.logsigmoid(x) - eps * F.logsigmoid(-x)


@_register(
    "-(1-eps) LS(beta d) - eps LS(-beta d)",
    "DPO, arXiv 2305.18290 eq 7; with eps > 0 cDPO",
    ("beta", "label_smoothing"),
    kernel=True,
)
def sigmoid(pairs: PairLogps, options: LossOptions) -> Tensor:
    return _smoothed(options.beta * pairs.margin, options.label_smoothing)


@_register(
    "(a/nw - b/nl - 1/(2 beta))^2; sums instead of means with length_average=false",
    "IPO, arXiv 2310.12036 eq 17",
    ("beta", "length_average"),
    kernel=True,
)
def ipo(pairs: PairLogps, options: LossOptions) -> Tensor:
    margin = pairs.length_averaged_margin if options.length_average else pairs.margin
    return (margin - 1 / (2 * options.beta)).square()


@_register("relu(1 - beta d)", "RSO, arXiv 2309.06657", ("beta",), kernel=True)
def hinge(pairs: PairLogps, options: LossOptions) -> Tensor:
    return torch.relu(1 - options.beta * pairs.margin)


@_register(
    "(-(1-eps) LS(beta d) + eps LS(-beta d)) / (1 - 2 eps)",
    "robust DPO, arXiv 2403.00409",
    ("beta", "label_smoothing"),
    kernel=True,
)
def robust(pairs: PairLogps, options: LossOptions) -> Tensor:
    x, eps = options.beta * pairs.margin, options.label_smoothing
    return (-(1 - eps) * F.logsigmoid(x) + eps * F.logsigmoid(-x)) / (1 - 2 * eps)


@_register(
    "-(1-eps) LS(x) - eps LS(-x), x = beta (a/nw - b/nl)",
    "length-normalised DPO of Tulu 3, arXiv 2411.15124 eq 6",
    ("beta", "label_smoothing"),
    kernel=True,
)
def sigmoid_norm(pairs: PairLogps, options: LossOptions) -> Tensor:
    return _smoothed(options.beta * pairs.length_averaged_margin, options.label_smoothing)


@_register(
    "-lw, divided by the chosen tokens of the global batch",
    "RPO, arXiv 2404.19733; MPO, arXiv 2411.10442",
    (),
    needs_reference=False,
    normaliser="chosen_tokens",
    kernel=True,
)
def sft(pairs: PairLogps, options: LossOptions) -> Tensor:
    return -pairs.chosen
