"""What contenders share, and the plain head."""

from __future__ import annotations

import functools
import os
import shutil

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.kernels.case import Case, HeadInputs, Outputs
from dpo_fast.ops.dispatch import interpreting, why_not_cuda, why_not_triton

INTERPRETED = 1 << 18  # elements of [T, V] beyond which Triton's interpreter takes minutes

COMPLETION = 1024  # tokens of each of Liger's completions, if T allows
BETA = 0.01  # sums of a thousand log-probs differ by about a hundred nats: the sigmoid must not saturate


def why_not(implementation: str, case: Case) -> str | None:
    """Why one of our implementations cannot run a case; None if it can."""
    if implementation == "torch":
        return None
    if case.device == "cpu" and interpreting() and case.T * case.V > INTERPRETED:
        return "Triton's interpreter is for tests: choose T * V <= 2^18, or unset TRITON_INTERPRET"
    if implementation == "cuda":
        return why_not_cuda("linear_logp", torch.device(case.device), case.torch_dtype)
    return why_not_triton(torch.device(case.device), case.torch_dtype)


def differentiated(case: Case, inputs: HeadInputs, function):
    """A run of `function(hidden, weight, targets) -> (values, root)` in the case's mode.

    root: what is differentiated; with the slopes per token if it has one element per token.
    """
    hidden, weight, targets, slopes = inputs
    if case.mode != "trainable":
        weight = weight.detach()
    if case.mode == "logps":  # some ask the tensor, not autograd, whether it needs a gradient
        hidden = hidden.detach()
    leaves = [x for x in (hidden, weight) if x.requires_grad]

    def run() -> Outputs:
        if case.mode == "logps":
            with torch.no_grad():
                return Outputs(function(hidden, weight, targets)[0])
        values, root = function(hidden, weight, targets)
        plan = getattr(root.grad_fn, "plan", None)  # our own node keeps the plan of the call
        gradients = torch.autograd.grad(root, leaves, slopes if root.dim() else None)
        reported = (plan.schedule, plan.gemms) if plan else ()
        return Outputs(values.detach(), gradients, *reported)

    return run


def per_token(function):
    """`build` of a contender from `function(hidden, weight, targets) -> logp [T]`."""

    def build(case: Case, inputs: HeadInputs):
        def both(*arguments):
            logp = function(*arguments)
            return logp, logp

        return differentiated(case, inputs, both)

    return build


def materialised(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """What most trainers do: logits in the inputs' dtype, softmax in fp32."""
    logits = linear(hidden, weight).float()
    return torch.log_softmax(logits, -1).gather(1, targets[:, None]).squeeze(1)


@functools.cache
def compiled(function):
    """torch.compile, once per process: Dynamo guards on the shape and keeps a graph for each."""
    return torch.compile(function, dynamic=False)


def why_not_compile(case: Case) -> str | None:
    """Why torch.compile cannot run: it writes C++ for a CPU, and Triton with a C launcher for a GPU."""
    variable, usual = ("CXX", "g++") if case.device == "cpu" else ("CC", "gcc")
    names = (os.environ.get(variable, usual), usual, "clang")
    if any(shutil.which(name) for name in names):
        return None
    return f"torch.compile needs a compiler: install {usual}, or name one in {variable}"


def pairs(T: int) -> int:
    """Pairs of equally long completions with T tokens in all: no padding, Liger's best case."""
    return max(1, T // (2 * COMPLETION))


def pair_slopes(logp_T: torch.Tensor) -> torch.Tensor:
    """dL/dlogp of the mean DPO loss over those pairs, chosen first, without a reference."""
    P = pairs(len(logp_T))
    sums = logp_T.view(2 * P, -1).sum(-1)
    margin = BETA * (sums[:P] - sums[P:])
    chosen = -BETA * torch.sigmoid(-margin) / P
    return torch.cat([chosen, -chosen]).repeat_interleave(len(logp_T) // (2 * P))
