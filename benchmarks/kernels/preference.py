"""`preference`: token log-probabilities of pairs to the DPO loss and its slopes.

It moves a few kilobytes, so the number of launches counts and not the bytes. Lengths of completions are
log-normal, as in chat data: a quarter of them are longer than 1.6 times the median.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from benchmarks.kernels.case import Case, Contender, Operation, Outputs
from benchmarks.kernels.contenders import compiled, why_not, why_not_compile
from dpo_fast.losses import LossOptions, Objective, Totals, preference
from dpo_fast.ops.dispatch import IMPLEMENTATIONS

BETA = 0.1
MEAN_LENGTH, SPREAD = 256, 0.7  # tokens of a completion; standard deviation of ln(length)
GRADIENTS = {"logps": (), "trainable": ("logp",)}


class PairInputs(NamedTuple):
    """Inputs of the loss.

    logp: [T], a leaf.
    lengths: [S], tokens of each sequence.
    reference: [S], the reference's sums.
    slopes: [1], dL/dloss.
    targets: [T], the sequence of each token. The name is the one that every operation's inputs have.
    """

    logp: Tensor
    lengths: Tensor
    reference: Tensor
    slopes: Tensor
    targets: Tensor


def pair_inputs(T: int, device: torch.device | str = "cpu", seed: int = 0) -> PairInputs:
    generator = torch.Generator(device).manual_seed(seed)
    normal = lambda size: torch.randn(size, generator=generator, device=device)  # noqa: E731
    S = 2 * max(1, T // (2 * MEAN_LENGTH))
    shares = normal(S).mul_(SPREAD).exp_()
    lengths = (shares / shares.sum() * (T - S)).long() + 1
    lengths[-1] += T - lengths.sum()
    owners = torch.arange(S, device=device).repeat_interleave(lengths)
    logp = -normal(T).exp_()  # median -1, mean -1.6
    reference = logp.new_zeros(S).index_add_(0, owners, logp) + 5 * normal(S)
    return PairInputs(logp.requires_grad_(), lengths, reference, logp.new_ones(1), owners)


def _run(function):
    """`build` from `function(inputs) -> loss`."""

    def build(case: Case, inputs: PairInputs):
        detached = inputs._replace(logp=inputs.logp.detach())

        def run() -> Outputs:
            if case.mode == "logps":
                with torch.no_grad():
                    return Outputs(function(detached).view(1))
            loss = function(inputs)
            return Outputs(loss.detach().view(1), torch.autograd.grad(loss, inputs.logp))

        return run

    return build


def ours(implementation: str, inputs: PairInputs) -> Tensor:
    objective = Objective(("sigmoid",), (1.0,), LossOptions(beta=BETA))
    totals = Totals(pairs=len(inputs.lengths) // 2, chosen_tokens=len(inputs.logp))
    arguments = (inputs.logp, inputs.lengths, inputs.reference, objective, totals)
    return preference(*arguments, implementation=implementation).loss


def plain(logp: Tensor, owners: Tensor, reference: Tensor) -> Tensor:
    """Plain PyTorch: sums by index, log-ratios, log-sigmoid, mean."""
    ratios = (logp.new_zeros(len(reference)).index_add(0, owners, logp) - reference).view(-1, 2)
    return -logsigmoid(BETA * (ratios[:, 0] - ratios[:, 1])).mean()


def _plain(function, inputs: PairInputs) -> Tensor:
    return function()(inputs.logp, inputs.targets, inputs.reference)


class Truth:
    """The loss and its gradient in fp64, sequence by sequence. logp: the loss, [1]."""

    def __init__(self, inputs: PairInputs):
        leaf = inputs.logp.detach().double().requires_grad_()
        sums = torch.stack([part.sum() for part in leaf.split(inputs.lengths.tolist())])
        chosen, rejected = (sums - inputs.reference.double()).view(-1, 2).unbind(1)
        loss = -logsigmoid(BETA * (chosen - rejected)).mean()
        self.by_input = {"logp": torch.autograd.grad(loss, leaf)[0]}
        self.logp = loss.detach().view(1)

    def gradients(self, kind: str, slopes: Tensor, names: tuple[str, ...]) -> dict[str, Tensor]:
        return self.by_input


def work(case: Case, count: float) -> tuple[float, float]:
    """No flops. Bytes: the log-probs are read, and their gradient written."""
    return 0.0, 4.0 * case.T * (1 if case.mode == "logps" else 2)


OPERATION = Operation(
    name="preference",
    contenders=(
        *(
            Contender(
                f"dpo_fast {name}",
                _run(functools.partial(ours, name)),
                ours=True,
                exact=True,
                obstacle=functools.partial(why_not, name),
            )
            for name in IMPLEMENTATIONS
        ),
        Contender("plain", _run(functools.partial(_plain, lambda: plain))),
        Contender(
            "plain, compiled",
            _run(functools.partial(_plain, lambda: compiled(plain))),
            obstacle=why_not_compile,
            compiled=True,
        ),
    ),
    sizes="T",
    dtypes=("fp32",),
    gradients=GRADIENTS,
    least=dict.fromkeys(GRADIENTS, 0.0),
    inputs=lambda case, seed: pair_inputs(case.T, case.device, seed),
    truth=Truth,
    products=lambda case, inputs: {},
    needed=lambda case, count: {},
    work=work,
)
