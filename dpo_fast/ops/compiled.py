"""The operations as PyTorch custom operators, for torch.compile: no graph break, any number of tokens.

Only compiled code calls them, as `torch.ops.dpo_fast.*`; the autograd functions beside it go on serving
eager code, because there a sharded Parameter itself has to outlive the forward pass. The schedules are
the same, and so is every number. How many tokens keep their exponentials depends on sizes that the
compiler does not know: it is a dynamic size of its own to it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dpo_fast.ops.dispatch import choose_implementation
from dpo_fast.ops.linear_logp.op import HeadOptions, check_call, check_targets, schedule_of
from dpo_fast.ops.linear_logp.plan import HeadPlan, default_workspace_bytes, kept_stride, plan
from dpo_fast.ops.logits_logp import backward as logits_gradient
from dpo_fast.ops.logits_logp import forward as logits_forward

# Lists of names travel as one string, and these belong to every call of the head.
HEAD = (
    "Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, float logit_scale, float? softcap, "
    "float temperature, str extras, str implementation, int? workspace_bytes, bool[] needs"
)


def _names(extras: str) -> tuple[str, ...]:
    return tuple(filter(None, extras.split(",")))


def _saved(needs: list[bool]) -> tuple[str, ...]:
    """What the forward pass leaves for the backward one. needs: gradients of hidden, weight, bias."""
    if needs[1] or needs[2]:
        return "kept", "total", "offset"
    return ("direction",) if needs[0] else ()


def _schedule(hidden, weight, implementation, workspace_bytes, needs) -> tuple[object, HeadPlan]:
    name = choose_implementation("linear_logp", hidden.device, hidden.dtype, implementation).name
    if workspace_bytes is None:
        workspace_bytes = default_workspace_bytes(hidden.device)
    chosen = plan(
        hidden.shape[0],
        weight.shape[0],
        weight.shape[1],
        hidden.dtype,
        needs_hidden=needs[0],
        needs_head=needs[1] or needs[2],
        workspace_bytes=workspace_bytes,
        implementation=name,
    )
    return schedule_of(name), chosen


@torch.library.custom_op("dpo_fast::linear_logp", mutates_args=(), schema=f"({HEAD}) -> Tensor[]")
def linear_logp(
    hidden,
    weight,
    targets,
    bias,
    logit_scale,
    softcap,
    temperature,
    extras,
    implementation,
    workspace_bytes,
    needs,
):
    """[logp, *extras, *what backward needs]."""
    check_targets(targets, weight.shape[0])
    options = HeadOptions(logit_scale, softcap, temperature)
    schedule, chosen = _schedule(hidden, weight, implementation, workspace_bytes, needs)
    outputs, saved = schedule.forward(
        hidden, weight, bias, targets, options, _names(extras), chosen, None
    )
    results = [outputs[name] for name in ("logp", *_names(extras))]
    return results + [saved[name] for name in _saved(needs)]


@linear_logp.register_fake
def _(
    hidden,
    weight,
    targets,
    bias,
    logit_scale,
    softcap,
    temperature,
    extras,
    implementation,
    workspace_bytes,
    needs,
):
    check_call(hidden, weight, targets, bias, _names(extras))
    HeadOptions(logit_scale, softcap, temperature)
    name = choose_implementation("linear_logp", hidden.device, hidden.dtype, implementation).name
    T, (V, D) = hidden.shape[0], weight.shape
    precision = torch.promote_types(hidden.dtype, torch.float32)
    dtypes = [torch.bool if x == "is_top1" else precision for x in ("logp", *_names(extras))]
    results = [hidden.new_empty(T, dtype=dtype) for dtype in dtypes]
    if "direction" in _saved(needs):
        results.append(hidden.new_empty(T, D))
    elif "kept" in _saved(needs):
        K = torch.library.get_ctx().new_dynamic_size()
        stride = V if name == "torch" else kept_stride(V)
        results.append(hidden.new_empty(K, stride)[:, :V])
        results += [hidden.new_empty(T, dtype=precision) for _ in range(2)]
    return results


@torch.library.custom_op(
    "dpo_fast::linear_logp_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor[] saved, {HEAD}) -> Tensor[]",
)
def linear_logp_backward(
    grad,
    saved,
    hidden,
    weight,
    targets,
    bias,
    logit_scale,
    softcap,
    temperature,
    extras,
    implementation,
    workspace_bytes,
    needs,
):
    """Those of the gradients of hidden, weight and bias that are needed."""
    options = HeadOptions(logit_scale, softcap, temperature)
    schedule, chosen = _schedule(hidden, weight, implementation, workspace_bytes, needs)
    gradients = schedule.backward(
        grad, hidden, weight, bias, targets, options, chosen, dict(zip(_saved(needs), saved)), needs
    )
    return [gradient for gradient in gradients if gradient is not None]


@linear_logp_backward.register_fake
def _(
    grad,
    saved,
    hidden,
    weight,
    targets,
    bias,
    logit_scale,
    softcap,
    temperature,
    extras,
    implementation,
    workspace_bytes,
    needs,
):
    return [x.new_empty(x.shape) for x, need in zip((hidden, weight, bias), needs) if need]


def _head_context(ctx, inputs, output) -> None:
    hidden, weight, targets, bias, *ctx.arguments = inputs
    ctx.needs = ctx.arguments[-1]
    saved = output[len(output) - len(_saved(ctx.needs)) :]
    if "direction" in _saved(ctx.needs):  # its backward is a product of rows
        hidden = weight = targets = bias = None
    ctx.save_for_backward(hidden, weight, targets, bias, *saved)
    ctx.set_materialize_grads(False)


def _head_backward(ctx, gradients):
    hidden, weight, targets, bias, *saved = ctx.saved_tensors
    grad, nothing = gradients[0], (None,) * len(ctx.arguments)
    if grad is None:
        return None, None, None, None, *nothing
    if "direction" in _saved(ctx.needs):
        return (saved[0] * grad[:, None]).to(saved[0].dtype), None, None, None, *nothing
    values = iter(
        torch.ops.dpo_fast.linear_logp_backward(
            grad, saved, hidden, weight, targets, bias, *ctx.arguments
        )
    )
    dH, dW, db = (next(values) if need else None for need in ctx.needs)
    return dH, dW, None, db, *nothing


linear_logp.register_autograd(_head_backward, setup_context=_head_context)


@torch.library.custom_op("dpo_fast::logits_logp", mutates_args=())
def logits_logp(
    logits_TV: Tensor, targets: Tensor, temperature: float, implementation: str
) -> tuple[Tensor, Tensor]:
    """logp and the log-sum-exp of each row, [T]."""
    check_targets(targets, logits_TV.shape[-1])
    return logits_forward(logits_TV, targets, temperature, implementation)


@logits_logp.register_fake
def _(logits_TV, targets, temperature, implementation):
    dtype = torch.promote_types(logits_TV.dtype, torch.float32)
    return targets.new_empty(targets.shape, dtype=dtype), targets.new_empty(
        targets.shape, dtype=dtype
    )


@torch.library.custom_op("dpo_fast::logits_logp_backward", mutates_args=())
def logits_logp_backward(
    grad: Tensor,
    logits_TV: Tensor,
    targets: Tensor,
    lse: Tensor,
    temperature: float,
    implementation: str,
) -> Tensor:
    return logits_gradient(grad, logits_TV, targets, lse, temperature, implementation)


@logits_logp_backward.register_fake
def _(grad, logits_TV, targets, lse, temperature, implementation):
    return logits_TV.new_empty(logits_TV.shape)


def _logits_context(ctx, inputs, output) -> None:
    logits_TV, targets, ctx.temperature, ctx.implementation = inputs
    ctx.save_for_backward(logits_TV, targets, output[1])
    ctx.set_materialize_grads(False)


def _logits_backward(ctx, grad, _):
    if grad is None:
        return None, None, None, None
    gradient = torch.ops.dpo_fast.logits_logp_backward(
        grad, *ctx.saved_tensors, ctx.temperature, ctx.implementation
    )
    return gradient, None, None, None


logits_logp.register_autograd(_logits_backward, setup_context=_logits_context)
