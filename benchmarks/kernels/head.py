"""What contenders for the loss head share: running in a mode, the plain head, and torch.compile."""

from __future__ import annotations

import functools
import os
import shutil

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.kernels.case import Case, HeadInputs, Outputs


def differentiated(case: Case, inputs: HeadInputs, function):
    """A run of `function(hidden, weight, targets) -> (values, root)` in the case's mode: `root` is
    what is differentiated, with the slopes per token if it has one element per token."""
    hidden, weight, targets, slopes = inputs
    if case.mode != "trainable":
        weight = weight.detach()
    if case.mode == "logps":  # some ask a tensor, and not autograd, whether to compute gradients
        hidden = hidden.detach()
    leaves = [x for x in (hidden, weight) if x.requires_grad]

    def run() -> Outputs:
        if case.mode == "logps":
            with torch.no_grad():
                return Outputs(function(hidden, weight, targets)[0])
        values, root = function(hidden, weight, targets)
        # Our own node holds the plan that the call followed.
        plan = getattr(root.grad_fn, "plan", None)
        gradients = torch.autograd.grad(root, leaves, slopes if root.dim() else None)
        told = (plan.schedule, plan.gemms) if plan else ()
        return Outputs(values.detach(), gradients, *told)

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
    """Once per process: Dynamo guards on the shape and keeps a graph for each."""
    return torch.compile(function, dynamic=False)


def why_not_compile(case: Case) -> str | None:
    """torch.compile writes C++ for a CPU, and Triton with a C launcher for a GPU."""
    variable, usual = ("CXX", "g++") if case.device == "cpu" else ("CC", "gcc")
    names = (os.environ.get(variable, usual), usual, "clang")
    if any(shutil.which(name) for name in names):
        return None
    return f"torch.compile needs a compiler: install {usual}, or name one in {variable}"
