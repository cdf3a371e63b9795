"""`linear_logp`: the public function, and the autograd function that runs a schedule."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dpo_fast.ops.cpu import product_dtype
from dpo_fast.ops.dispatch import choose_implementation
from dpo_fast.ops.integers import as_int64
from dpo_fast.ops.linear_logp.call import HeadCall, HeadOptions, check_call, check_targets
from dpo_fast.ops.linear_logp.dtensor import plain_input, plain_weight
from dpo_fast.ops.linear_logp.plan import HeadPlan, default_workspace_bytes, plan
from dpo_fast.ops.linear_logp.vocab_shard import VocabShard, sharded_dim, whole_vocabulary
from dpo_fast.ops.once import once_differentiable


class LinearLogp(NamedTuple):
    """Per scored token, [T]. `logp` is differentiable; the extras are not, and None unless asked for."""

    logp: Tensor
    entropy: Tensor | None = None
    log_sum_p2: Tensor | None = None
    mean_logit: Tensor | None = None
    is_top1: Tensor | None = None


def linear_logp(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    extras: tuple[str, ...] = (),
    implementation: str = "auto",
    workspace_bytes: int | None = None,
    shard: VocabShard | None = None,
) -> LinearLogp:
    """Log-probability of each target under a linear head, without a [T, V] tensor of logits.

    logp_t = z_t,y_t - logsumexp_v z_tv,   z = cap(logit_scale * (h W^T + b)) / temperature

    Args:
        hidden_TD: [T, D], fp32, bf16, fp16 or fp64, any strides. Only rows that are scored.
        weight_VD: [V, D], the head's weight, same dtype and device (under autocast both are cast). A
            DTensor is cast, gathered by all its ranks, and gets its gradient as a DTensor: the mean over
            them, as FSDP2 has it.
        targets_T: [T], int64 (or other integers) in 0..V-1.
        bias: [V] or None.
        logit_scale, softcap, temperature: see the formula (Cohere, Gemma 2, sampling).
        extras: any of `entropy`, `log_sum_p2`, `mean_logit`, `is_top1`; computed in the same pass,
            without gradients.
        implementation: `auto`, `torch`, `triton`, or `cuda` for the kernels of csrc (sm_90a, bf16), which
            `auto` takes for D up to 1024 where they are built. A name that cannot run here is an error.
        workspace_bytes: memory for exponentials kept between forward and backward; 0 recomputes
            them all. Default: 1 GiB on a CPU, a sixteenth of the memory of a GPU.
        shard: the weight (and bias) are this rank's slice of the vocabulary, `VocabShard.of(weight)`; as
            DTensors, those that hold it, and then nothing is gathered. Hidden states and targets are the
            same on every rank, and so are all results and the gradient of the hidden states. All ranks
            of the group must call.

    Returns:
        `LinearLogp`, each field [T] in fp32 (fp64 for fp64 inputs) from fp32 logits.

    Raises:
        ValueError: shapes, dtypes, options or targets that do not fit.
        UnavailableError: the named implementation cannot run on this device.
    """
    targets_T = as_int64(plain_input(targets_T, "targets"), "targets")
    hidden_TD, weight_VD, bias = _autocast(plain_input(hidden_TD, "hidden"), weight_VD, bias)
    weight_VD, bias = _plain(hidden_TD, weight_VD, bias, shard)
    extras, needs = tuple(extras), _needs(hidden_TD, weight_VD, bias)
    if torch.compiler.is_compiling() and shard is None:
        return _compiled(
            (hidden_TD, weight_VD, targets_T, bias, logit_scale, softcap, temperature),
            extras,
            (implementation, workspace_bytes, needs),
        )
    options = HeadOptions(logit_scale, softcap, temperature)
    check_call(hidden_TD, weight_VD, targets_T, bias, extras)
    check_targets(targets_T, whole_vocabulary(weight_VD, shard))
    name = implementation_of(hidden_TD, weight_VD, bias, softcap, implementation)
    chosen = plan_call(hidden_TD, weight_VD, needs, workspace_bytes, name, shard)
    values = _LinearLogp.apply(
        hidden_TD, weight_VD, bias, targets_T, extras, name, (options, chosen, shard)
    )
    return LinearLogp(**dict(zip(("logp", *extras), values)))


class _LinearLogp(torch.autograd.Function):
    """One node, so that a sharded weight is gathered once for the forward and once for the backward."""

    @staticmethod
    def forward(ctx, hidden_TD, weight_VD, bias, targets_T, extras, implementation, settings):
        _, plan, shard = settings
        if shard is not None:
            targets_T = targets_T - shard.first
        call = HeadCall(hidden_TD, weight_VD, targets_T, bias, *settings)
        with _own_precision(hidden_TD):
            outputs, saved = schedules_of(implementation).forward(call, extras)
        ctx.implementation, ctx.settings, ctx.names = implementation, settings, tuple(saved)
        ctx.plan = plan  # for the benchmarks, which report the schedule
        # A leaf weight stays on ctx itself: DeepSpeed swaps the storage of a sharded parameter, and
        # has it gathered again when backward runs. Everything else gets autograd's version check.
        ctx.weight = weight_VD if weight_VD.is_leaf else None
        ctx.version = version_of(weight_VD)
        hidden_TD = None if plan.schedule == "frozen" else hidden_TD  # not read again
        weight_VD = None if ctx.weight is not None else weight_VD
        ctx.save_for_backward(hidden_TD, bias, targets_T, weight_VD, *saved.values())
        ctx.set_materialize_grads(False)
        logp_T, *rest = (outputs[name] for name in ("logp", *extras))
        ctx.mark_non_differentiable(*rest)
        return logp_T, *rest

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_T, *_):
        if grad_T is None:
            return (None,) * 7
        hidden_TD, bias, targets_T, weight_VD, *values = ctx.saved_tensors
        saved, needs = dict(zip(ctx.names, values)), ctx.needs_input_grad[:3]
        _, _, shard = ctx.settings
        if "direction" in saved:
            dH, dW, db = scaled_direction(saved["direction"], grad_T), None, None
        else:
            weight_VD = _unchanged(ctx.weight, ctx.version) if weight_VD is None else weight_VD
            call = HeadCall(hidden_TD, weight_VD, targets_T, bias, *ctx.settings)
            with _own_precision(grad_T):
                dH, dW, db = schedules_of(ctx.implementation).backward(call, grad_T, saved, needs)
        if shard is not None and dH is not None:
            dH = shard.sum(dH.float()).to(dH.dtype)
        return dH, dW, db, None, None, None, None


def version_of(weight: Tensor) -> int | None:
    """How often a tensor was changed in place; None where nobody counts (inference mode)."""
    return None if weight.is_inference() else weight._version


def _unchanged(weight: Tensor, version: int | None) -> Tensor:
    """Raises RuntimeError, as autograd does of saved tensors, if a weight was changed since the forward."""
    if version_of(weight) != version:
        raise RuntimeError(
            f"the weight of the head, {tuple(weight.shape)}, has been modified by an inplace operation "
            "between forward and backward, and gradients would belong to neither value: let the optimizer "
            "step after all backward passes"
        )
    return weight


class Schedules(Protocol):
    """The module of an implementation: it runs any `HeadPlan`."""

    def forward(
        self, call: HeadCall, extras: tuple[str, ...]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(outputs, saved).

        outputs: logp and the extras, [T] each.
        saved: for `backward` kept [kept_tokens, V], offset and total [T]; for a frozen head direction
            [T, D], the gradient of the hidden states for a gradient of 1; {} where nothing is wanted.
        """

    def backward(
        self, call: HeadCall, grad_T: Tensor, saved: dict[str, Tensor], needs: tuple[bool, ...]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of hidden states, weight and bias; None for those that `needs` does not want.

        A frozen head has no backward pass: see `scaled_direction`.
        """


def schedules_of(implementation: str) -> Schedules:
    """Imported on first use: triton is heavy, and not on every machine."""
    if implementation == "torch":
        from dpo_fast.ops.linear_logp import torch as schedules
    elif implementation == "triton":
        from dpo_fast.ops.linear_logp import triton as schedules
    else:
        from dpo_fast.ops.linear_logp import cuda as schedules
    return schedules


def scaled_direction(direction_TD: Tensor, grad_T: Tensor) -> Tensor:
    """The gradient of the hidden states under a frozen head."""
    return (direction_TD * grad_T[:, None]).to(direction_TD.dtype)


def implementation_of(
    hidden_TD: Tensor, weight_VD: Tensor, bias: Tensor | None, softcap: float | None, requested: str
) -> str:
    """The name of the implementation that runs a call. One and the same for its two passes."""
    from dpo_fast.ops.linear_logp.cuda import serves_small

    small = requested == "auto" and serves_small(hidden_TD, weight_VD, bias, softcap)
    device, dtype = hidden_TD.device, hidden_TD.dtype
    return choose_implementation("linear_logp", device, dtype, requested, small).name


def _compiled(operands: tuple, extras: tuple[str, ...], rest: tuple) -> LinearLogp:
    """The same through the custom operator, which a compiler does not look into."""
    logp_T, *values = torch.ops.dpo_fast.linear_logp(*operands, ",".join(extras), *rest)
    return LinearLogp(logp_T, **{name: x.detach() for name, x in zip(extras, values)})


def _plain(
    hidden_TD: Tensor, weight_VD: Tensor, bias: Tensor | None, shard: VocabShard | None
) -> tuple[Tensor, Tensor | None]:
    """Weight and bias as plain tensors: DTensors gathered, or their own rows with a shard."""
    kept = (sharded_dim(weight_VD),) if shard and hasattr(weight_VD, "placements") else ()
    if kept and hasattr(bias, "placements") and bias.placements != weight_VD.placements:
        raise ValueError(
            f"bias has placements {bias.placements}, and weight {weight_VD.placements}: with a shard "
            "both lie alike"
        )
    return plain_weight(weight_VD, hidden_TD, kept), plain_weight(bias, hidden_TD, kept)


def _needs(*inputs: Tensor | None) -> list[bool]:
    """Of which a gradient is wanted."""
    grad = torch.is_grad_enabled()
    return [grad and x is not None and x.requires_grad for x in inputs]


def plan_call(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    needs: list[bool],
    workspace_bytes: int | None,
    implementation: str,
    shard: VocabShard | None = None,
) -> HeadPlan:
    """The plan for these tensors. needs: gradients of hidden states, weight and bias that are wanted."""
    if workspace_bytes is None:
        workspace_bytes = default_workspace_bytes(hidden_TD.device)
    dtype = hidden_TD.dtype
    products = product_dtype(hidden_TD.device, dtype) if implementation == "torch" else dtype
    return plan(
        hidden_TD.shape[0],
        weight_VD.shape[0] if shard is None else shard.largest,
        weight_VD.shape[1],
        dtype,
        needs_hidden=needs[0],
        needs_head=needs[1] or needs[2],
        workspace_bytes=workspace_bytes,
        implementation=implementation,
        products=products,
    )


def _own_precision(like: Tensor) -> torch.autocast:
    """Autocast off. It has acted on the operands; a schedule picks the precision of each product, and
    exponentials do not fit into fp16."""
    return torch.autocast(like.device.type, enabled=False)


def _autocast(hidden_TD: Tensor, weight_VD: Tensor, bias: Tensor | None):
    """The operands in autocast's dtype where it is on, as `torch.nn.functional.linear` has them."""
    device = hidden_TD.device.type
    if not torch.is_autocast_enabled(device) or hidden_TD.dtype == torch.float64:
        return hidden_TD, weight_VD, bias
    dtype = torch.get_autocast_dtype(device)
    return hidden_TD.to(dtype), weight_VD.to(dtype), None if bias is None else bias.to(dtype)
