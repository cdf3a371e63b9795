"""Other people's heads.

A peer is called as its own documentation or trainer calls it. It imports its package when it first runs, so
the table needs none of them.
"""

from __future__ import annotations

import importlib.util
import warnings

import torch

from benchmarks.cli import CCE, LIGER, QUACK, TRL
from benchmarks.kernels.case import MODES, Case, Contender, HeadInputs
from benchmarks.kernels.contenders import BETA, differentiated, pairs, per_token, why_not_compile

HALF = ("bf16", "fp16")
GPU = {"devices": ("cuda",)}
HOPPER = (9, 0)


def trl(outputs: tuple[str, ...]):
    """TRL's chunked log-prob with DPOTrainer's arguments. outputs: the metrics asked for."""

    def function(hidden, weight, targets):
        from trl.kernels import ChunkedLogProbFunction
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as CHUNK

        arguments = (hidden, weight, None, targets, 1.0, CHUNK, None, 1.0, outputs)
        return ChunkedLogProbFunction.apply(*arguments)[0]

    return per_token(function)


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


def liger_scaled(hidden, weight, targets):
    """Liger's cross-entropy per token: CuTe kernels on Hopper, elsewhere PyTorch in chunks of tokens."""
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    return -LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, targets)


def _why_not_liger_scaled(case: Case) -> str | None:
    if reason := LIGER.lacks("ops/fused_linear_scaled_cross_entropy.py"):
        return reason
    if case.device == "cpu" or torch.cuda.get_device_capability() != HOPPER:
        return None
    return _why_not_liger_cute(case)


def _why_not_liger_cute(case: Case) -> str | None:
    if importlib.util.find_spec("cutlass") is None:
        return "Liger's CuTe kernels need nvidia-cutlass-dsl: pip install 'liger-kernel[cutedsl]'"
    return None if case.dtype == "bf16" else f"Liger's CuTe kernels take bf16, not {case.dtype}"


def liger_hopper(case: Case, inputs: HeadInputs):
    """Liger's CuTe kernels for a cross-entropy of equal slopes."""

    def function(hidden, weight, targets):
        from liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90 import (
            liger_fused_linear_cross_entropy_sm90 as cross_entropy,
        )

        return _of_loss(cross_entropy(hidden, weight, targets, reduction="sum"))

    return differentiated(case, inputs, function)


def _why_not_liger_hopper(case: Case) -> str | None:
    if reason := LIGER.lacks("ops/cutedsl/ops/fused_linear_cross_entropy_sm90.py"):
        return reason
    if torch.cuda.get_device_capability() != HOPPER:
        return "needs compute capability 9.0"
    if case.T % 128 or case.V % 256:
        return f"needs T in multiples of 128 and V of 256, not {case.T} and {case.V}"
    return _why_not_liger_cute(case)


def cce(**options):
    def function(hidden, weight, targets):
        from cut_cross_entropy import linear_cross_entropy

        return -linear_cross_entropy(hidden, weight, targets, reduction="none", **options)

    return per_token(function)


def quack(**options):
    def function(hidden, weight, targets):
        from quack.linear_cross_entropy import chunked_linear_cross_entropy as cross_entropy

        return _of_loss(cross_entropy(hidden, weight, targets, reduction="sum", **options))

    return lambda case, inputs: differentiated(case, inputs, function)


def _why_not_quack(case: Case) -> str | None:
    if torch.cuda.get_device_capability() < HOPPER:
        return "QuACK needs compute capability 9.0 or more"
    if case.T % 8 or case.D % 8 or case.V % 8:
        return f"QuACK needs T, D and V in multiples of 8, not {case.T}, {case.D}, {case.V}"
    return None


def _why_not_quack_logits(case: Case) -> str | None:
    """Why this form is not a contender of its own beside the one that QuACK chooses."""
    if QUACK.lacks("epilogue/scaled_exp.py") or torch.cuda.get_device_capability() != HOPPER:
        return "QuACK has no other form here: see quack ce"
    return _why_not_quack(case)


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


def _quack(name: str, obstacle, **options) -> Contender:
    return Contender(
        name,
        quack(**options),
        package=QUACK,
        slopes="equal",
        dtypes=("bf16",),
        obstacle=obstacle,
        growth=not options,
        **GPU,
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
    Contender(
        "liger ce, sm_90",
        liger_hopper,
        package=LIGER,
        slopes="equal",
        modes=("frozen", "trainable"),
        obstacle=_why_not_liger_hopper,
        growth=False,
        **GPU,
    ),
    Contender(
        "liger scaled ce",
        per_token(liger_scaled),
        package=LIGER,
        obstacle=_why_not_liger_scaled,
        spare=_on_a_cpu(*MODES),
    ),
    Contender("cce, filtered", cce(), package=CCE, dtypes=HALF, **GPU),
    Contender("cce, exact", cce(filter_eps=None), package=CCE, dtypes=HALF, growth=False, **GPU),
    _quack("quack ce", _why_not_quack),
    _quack("quack ce, logits", _why_not_quack_logits, use_scaled_exp=False),
    _torch("torch linear_cross_entropy", "none"),
    _torch("torch linear_cross_entropy, sum", "sum", slopes="equal", growth=False),
)
