"""Other people's heads, each called the way its own documentation or trainer calls it.

A peer imports its package when it first runs, so that the table needs none of them.
"""

from __future__ import annotations

import warnings

import torch

from benchmarks.cli import CCE, LIGER, QUACK, TRL
from benchmarks.kernels.case import MODES, Case, Contender, HeadInputs
from benchmarks.kernels.head import differentiated, per_token, why_not_compile

COMPLETION = 1024  # tokens of each of Liger's completions, where T allows
BETA = 0.01  # sums of a thousand log-probs differ by about a hundred nats: the sigmoid must not saturate
HALF = ("bf16", "fp16")
GPU = {"devices": ("cuda",)}


def trl(outputs: tuple[str, ...]):
    """TRL's chunked log-prob with the arguments of DPOTrainer; bare, or with its metrics."""

    def function(hidden, weight, targets):
        from trl.kernels import ChunkedLogProbFunction
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as CHUNK

        arguments = (hidden, weight, None, targets, 1.0, CHUNK, None, 1.0, outputs)
        return ChunkedLogProbFunction.apply(*arguments)[0]

    return per_token(function)


def pairs(T: int) -> int:
    """Pairs whose completions, all equally long, have T tokens in all: no padding, Liger's best case."""
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
            value, told = loss(weight, hidden.view(*rows, case.D), targets.view(rows))
            return torch.cat(told[:2]), value

        return differentiated(case, inputs, function)

    return build


def _uneven(case: Case) -> str | None:
    count = 2 * pairs(case.T)
    if case.T % count == 0:
        return None
    return f"needs {count} completions of equal length: choose T as a multiple of {count}, not {case.T}"


def _of_loss(loss: torch.Tensor):
    """(log-probs, what to differentiate) of a cross-entropy. A sum is differentiated as it is: with an
    upstream slope of 1 its gradients need no scaling, and some skip it."""
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
    """PyTorch's own head in its chunked form; without options it is the materialised one."""

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
    """`spare`: on a CPU in these modes. They would add minutes."""
    return lambda case: case.device == "cpu" and case.mode in modes


def _liger(compile: bool) -> Contender:
    """One of two stands in the table: compiled where that is possible."""
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
    """On a CPU its chunks are a dozen tokens: several times slower than anything else."""
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
