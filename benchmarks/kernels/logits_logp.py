"""`logits_logp`: ours, plain PyTorch and TRL's. It has no product: the copy's bandwidth is its ceiling."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from benchmarks.cli import TRL
from benchmarks.kernels.case import Case, Contender, LogitsInputs, Operation, Outputs, logits_inputs
from benchmarks.kernels.checks import LogitsTruth
from benchmarks.kernels.contenders import compiled, why_not, why_not_compile
from dpo_fast import logits_logp
from dpo_fast.ops.dispatch import IMPLEMENTATIONS

GRADIENTS = {"logps": (), "trainable": ("logits",)}


def per_token(function):
    """`build` from `function(logits, targets) -> logp [T]`."""

    def build(case: Case, inputs: LogitsInputs):
        def run() -> Outputs:
            if case.mode == "logps":
                with torch.no_grad():
                    return Outputs(function(inputs.logits.detach(), inputs.targets))
            logp = function(inputs.logits, inputs.targets)
            return Outputs(logp.detach(), torch.autograd.grad(logp, inputs.logits, inputs.slopes))

        return run

    return build


def plain(logits: Tensor, targets: Tensor) -> Tensor:
    logp = torch.log_softmax(logits.float(), -1)
    return logp.gather(1, targets[:, None]).squeeze(1)


def trl(logits: Tensor, targets: Tensor) -> Tensor:
    from trl.trainer.utils import selective_log_softmax

    return selective_log_softmax(logits, targets)


def work(case: Case, count: float) -> tuple[float, float]:
    """No flops. Bytes: the logits are read; in backward they are read again and their gradient written."""
    passes = 1 if case.mode == "logps" else 3
    return 0.0, float(passes * case.T * case.V * case.itemsize)


OPERATION = Operation(
    name="logits_logp",
    contenders=(
        *(
            Contender(
                f"dpo_fast {name}",
                per_token(functools.partial(logits_logp, implementation=name)),
                ours=True,
                exact=True,
                obstacle=functools.partial(why_not, name),
            )
            for name in IMPLEMENTATIONS
        ),
        Contender("plain", per_token(plain)),
        Contender(
            "plain, compiled",
            lambda case, inputs: per_token(compiled(plain))(case, inputs),
            obstacle=why_not_compile,
            compiled=True,
        ),
        Contender("trl selective_log_softmax", per_token(trl), package=TRL),
    ),
    sizes="TV",
    dtypes=None,
    gradients=GRADIENTS,
    least=dict.fromkeys(GRADIENTS, 0.0),
    inputs=lambda case, seed: logits_inputs(case.T, case.V, case.torch_dtype, case.device, seed),
    truth=LogitsTruth,
    products=lambda case, inputs: {},
    needed=lambda case, count: {},
    work=work,
)
