"""What contenders share, the plain head, and other people's heads.

A peer is called as its own documentation or trainer calls it. It imports its package when it first runs, so
the table needs none of them.
"""

from __future__ import annotations

import functools
import os
import shutil
import warnings

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.cli import CCE, LIGER, QUACK, TRL
from benchmarks.kernels.case import MODES, Case, Contender, HeadInputs, Outputs
from dpo_fast.ops.dispatch import interpreting, why_not_cuda, why_not_triton

INTERPRETED = 1 << 18  # elements of [T, V] beyond which Triton's interpreter takes minutes

COMPLETION = 1024  # tokens of each of Liger's completions, if T allows
BETA = 0.01  # sums of a thousand log-probs differ by about a hundred nats: the sigmoid must not saturate
HALF = ("bf16", "fp16")
GPU = {"devices": ("cuda",)}


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


def trl(outputs: tuple[str, ...]):
    """TRL's chunked log-prob with DPOTrainer's arguments. outputs: the metrics asked for."""

    def function(hidden, weight, targets):
        from trl.kernels import ChunkedLogProbFunction
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as CHUNK

        arguments = (hidden, weight, None, targets, 1.0, CHUNK, None, 1.0, outputs)
        return ChunkedLogProbFunction.apply(*arguments)[0]

    return per_token(function)


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


def liger_dpo(compile: bool):
    def build(case: Case, inputs: HeadInputs):
        def function(hidden, weight, targets):
            from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

            rows = 2 * pairs(case.T), -1
            loss = LigerFusedLinearDPOLoss(beta=BETA, compiled=compile, use_ref_model=False)
            value, parts = loss(weight, hidden.view(*rows, case.D), targets.view(rows))
            return torch.cat(parts[:2]), value

        return differentiated(case, inputs, function)

    return build


def _uneven(case: Case) -> str | None:
    count = 2 * pairs(case.T)
    if case.T % count == 0:
        return None
    return f"needs {count} completions of equal length: choose T as a multiple of {count}, not {case.T}"


def _of_loss(loss: torch.Tensor):
    """(log-probs, what to differentiate) of a cross-entropy.

    A sum is differentiated as it is: some skip the scaling of gradients if the upstream slope is 1.
    """
    return -loss, loss if loss.dim() == 0 else -loss


def liger_ce(reduction: str):
    def function(hidden, weight, targets):
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        loss = liger_fused_linear_cross_entropy(hidden, weight, targets, reduction=reduction)
        return _of_loss(loss)

    return lambda case, inputs: differentiated(case, inputs, function)


def cce(**options):
    def function(hidden, weight, targets):
        from cut_cross_entropy import linear_cross_entropy

        return -linear_cross_entropy(hidden, weight, targets, reduction="none", **options)

    return per_token(function)


def quack(case: Case, inputs: HeadInputs):
    def function(hidden, weight, targets):
        from quack.linear_cross_entropy import chunked_linear_cross_entropy

        return _of_loss(chunked_linear_cross_entropy(hidden, weight, targets, reduction="sum"))

    return differentiated(case, inputs, function)


def _why_not_quack(case: Case) -> str | None:
    if torch.cuda.get_device_capability() < (9, 0):
        return "QuACK needs compute capability 9.0 or more"
    if case.T % 8 or case.D % 8 or case.V % 8:
        return f"QuACK needs T, D and V in multiples of 8, not {case.T}, {case.D}, {case.V}"
    return None


def torch_chunked(reduction: str):
    """PyTorch's own head. The options make it chunked; without them it is the materialised one."""

    def function(hidden, weight, targets):
        from torch.nn import LinearCrossEntropyOptions
        from torch.nn.functional import linear_cross_entropy

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            loss = linear_cross_entropy(
                hidden, weight, targets, reduction=reduction, options=LinearCrossEntropyOptions()
            )
        return _of_loss(loss)

    return lambda case, inputs: differentiated(case, inputs, function)


def _why_not_torch_chunked(case: Case) -> str | None:
    if hasattr(torch.nn.functional, "linear_cross_entropy"):
        return None
    return f"torch {torch.__version__} has no linear_cross_entropy: upgrade to torch>=2.13"


def _on_a_cpu(*modes: str):
    """`spare` of a contender that would add minutes on a CPU, in these modes."""
    return lambda case: case.device == "cpu" and case.mode in modes


def _liger(compile: bool) -> Contender:
    """Liger's DPO. One of its two forms stands in the table: compiled if there is a compiler."""
    slow = _on_a_cpu("logps")
    return Contender(
        f"liger dpo, {'compiled' if compile else 'eager'}",
        liger_dpo(compile),
        package=LIGER,
        slopes="pairs",
        obstacle=_uneven,
        spare=lambda case: slow(case) or compile is not (why_not_compile(case) is None),
        compiled=compile,
    )


def _torch(name: str, reduction: str, **options) -> Contender:
    """PyTorch's head. On a CPU its chunks are a dozen tokens: several times slower than all others."""
    return Contender(
        name,
        torch_chunked(reduction),
        obstacle=_why_not_torch_chunked,
        spare=_on_a_cpu(*MODES),
        **options,
    )


TRL_EXTRAS = trl(("entropy", "mean_logits", "is_top1"))
PEERS = (
    Contender("trl", trl(()), package=TRL),
    Contender(
        "trl, extras",
        TRL_EXTRAS,
        package=TRL,
        modes=("logps", "trainable"),
        spare=_on_a_cpu("logps"),
        growth=False,
    ),
    _liger(compile=True),
    _liger(compile=False),
    Contender("liger ce", liger_ce("sum"), package=LIGER, slopes="equal", **GPU),
    Contender("liger ce, per token", liger_ce("none"), package=LIGER, growth=False, **GPU),
    Contender("cce, filtered", cce(), package=CCE, dtypes=HALF, **GPU),
    Contender("cce, exact", cce(filter_eps=None), package=CCE, dtypes=HALF, growth=False, **GPU),
    Contender(
        "quack ce",
        quack,
        package=QUACK,
        slopes="equal",
        dtypes=("bf16",),
        obstacle=_why_not_quack,
        **GPU,
    ),
    _torch("torch linear_cross_entropy", "none"),
    _torch("torch linear_cross_entropy, sum", "sum", slopes="equal", growth=False),
)
