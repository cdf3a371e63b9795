"""`preference` as it is measured: token log-probabilities of pairs to the DPO loss and its slopes.

A few kilobytes: what counts is how many operations are launched, not what they move. Completions have
lengths as chat data have them: log-normal, a quarter longer than 1.6 times the median.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from benchmarks.kernels.case import Case, Contender, Operation, Outputs
from benchmarks.kernels.head import compiled, why_not_compile
from benchmarks.kernels.linear_logp import why_not
from dpo_fast.losses import LossOptions, Objective, Totals, preference
from dpo_fast.ops.dispatch import IMPLEMENTATIONS

BETA = 0.1
MEAN_LENGTH, SPREAD = 256, 0.7  # tokens of a completion; standard deviation of ln(length)
GRADIENTS = {
    "logps": (),
    "trainable": ("logp",),
}  # forward only, and with the gradient of the log-probs


class PairInputs(NamedTuple):
    """Log-probs [T] (a leaf), lengths [S], the reference's sums [S], dL/dloss [1], sequence of each
    token [T]; `targets` are those: nothing here has a vocabulary."""

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
    """What a trainer would write: sums by index, log-ratios, log-sigmoid, mean."""
    ratios = (logp.new_zeros(len(reference)).index_add(0, owners, logp) - reference).view(-1, 2)
    return -logsigmoid(BETA * (ratios[:, 0] - ratios[:, 1])).mean()


def _plain(function, inputs: PairInputs) -> Tensor:
    return function()(inputs.logp, inputs.targets, inputs.reference)


class Truth:
    """The same formula in fp64, sequence by sequence. `logp` holds the loss, [1]."""

    def __init__(self, inputs: PairInputs):
        leaf = inputs.logp.detach().double().requires_grad_()
        sums = torch.stack([part.sum() for part in leaf.split(inputs.lengths.tolist())])
        chosen, rejected = (sums - inputs.reference.double()).view(-1, 2).unbind(1)
        loss = -logsigmoid(BETA * (chosen - rejected)).mean()
        self.found = {"logp": torch.autograd.grad(loss, leaf)[0]}
        self.logp = loss.detach().view(1)

    def gradients(self, kind: str, slopes: Tensor, names: tuple[str, ...]) -> dict[str, Tensor]:
        return self.found


def work(case: Case, count: float) -> tuple[float, float]:
    """No products. Bytes: log-probs read, and their gradient written."""
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
