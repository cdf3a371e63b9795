"""The operations as PyTorch custom operators, for torch.compile: no graph break, any number of tokens.

Only compiled code calls them, as `torch.ops.dpo_fast.*`. Eager code goes on through the autograd functions
beside them, because there a sharded Parameter itself has to outlive the forward pass. The schedules are
the same, and so is every number. The number of tokens that keep their exponentials depends on sizes that
the compiler does not know, so it is a dynamic size of its own.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dpo_fast.ops.dispatch import choose_implementation
from dpo_fast.ops.linear_logp.call import HeadCall, HeadOptions, check_call, check_targets
from dpo_fast.ops.linear_logp.op import implementation_of, plan_call, scaled_direction, schedules_of
from dpo_fast.ops.linear_logp.plan import kept_stride
from dpo_fast.ops.logits_logp import backward as logits_gradient
from dpo_fast.ops.logits_logp import forward as logits_forward
from dpo_fast.ops.once import once_differentiable

HEAD = (
    "Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, float logit_scale, float? softcap, "
    "float temperature, str extras, str implementation, int? workspace_bytes, bool[] needs"
)


class _Head(NamedTuple):
    """The arguments of `HEAD`, in its order.

    extras: names joined by commas, since a schema has no tuple of them.
    needs: which gradients are wanted, of hidden states, weight and bias.
    """

    hidden_TD: Tensor
    weight_VD: Tensor
    targets_T: Tensor
    bias: Tensor | None
    logit_scale: float
    softcap: float | None
    temperature: float
    extras: str
    implementation: str
    workspace_bytes: int | None
    needs: list[bool]

    @property
    def extra_names(self) -> tuple[str, ...]:
        return tuple(filter(None, self.extras.split(",")))

    @property
    def saved_names(self) -> tuple[str, ...]:
        """What the forward pass leaves for the backward one."""
        if self.needs[1] or self.needs[2]:
            return "kept", "total", "offset"
        return ("direction",) if self.needs[0] else ()

    @property
    def chosen(self) -> str:
        """The implementation that runs."""
        operands = self.hidden_TD, self.weight_VD, self.bias
        return implementation_of(*operands, self.softcap, self.implementation)

    @property
    def pads(self) -> bool:
        """Whether rows of exponentials are aligned. Asked of tensors that have no address yet."""
        device, dtype = self.hidden_TD.device, self.hidden_TD.dtype
        chosen = choose_implementation("linear_logp", device, dtype, self.implementation)
        return chosen.name != "torch"

    @property
    def options(self) -> HeadOptions:
        return HeadOptions(self.logit_scale, self.softcap, self.temperature)

    def call(self) -> HeadCall:
        hidden_TD, weight_VD, targets_T, bias = self[:4]
        plan = plan_call(hidden_TD, weight_VD, self.needs, self.workspace_bytes, self.chosen)
        return HeadCall(hidden_TD, weight_VD, targets_T, bias, self.options, plan)


@torch.library.custom_op("dpo_fast::linear_logp", mutates_args=(), schema=f"({HEAD}) -> Tensor[]")
def linear_logp(*arguments):
    """[logp, *extras, *what backward needs]."""
    head = _Head(*arguments)
    check_targets(head.targets_T, len(head.weight_VD))
    outputs, saved = schedules_of(head.chosen).forward(head.call(), head.extra_names)
    results = [outputs[name] for name in ("logp", *head.extra_names)]
    return results + [saved[name] for name in head.saved_names]


@linear_logp.register_fake
def _(*arguments):
    head = _Head(*arguments)
    hidden_TD, weight_VD, targets_T, bias = head[:4]
    check_call(hidden_TD, weight_VD, targets_T, bias, head.extra_names)
    _ = head.options  # raises for those out of range
    T, (V, D) = hidden_TD.shape[0], weight_VD.shape
    precision = torch.promote_types(hidden_TD.dtype, torch.float32)
    names = ("logp", *head.extra_names)
    dtypes = [torch.bool if name == "is_top1" else precision for name in names]
    results = [hidden_TD.new_empty(T, dtype=dtype) for dtype in dtypes]
    if "direction" in head.saved_names:
        results.append(hidden_TD.new_empty(T, D))
    elif "kept" in head.saved_names:
        kept_tokens = torch.library.get_ctx().new_dynamic_size()
        stride = kept_stride(V) if head.pads else V
        results.append(hidden_TD.new_empty(kept_tokens, stride)[:, :V])
        results += [hidden_TD.new_empty(T, dtype=precision) for _ in range(2)]
    return results


@torch.library.custom_op(
    "dpo_fast::linear_logp_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor[] saved, {HEAD}) -> Tensor[]",
)
def linear_logp_backward(grad_T, saved, *arguments):
    """The gradients of hidden states, weight and bias, as far as they are needed."""
    head = _Head(*arguments)
    saved = dict(zip(head.saved_names, saved))
    gradients = schedules_of(head.chosen).backward(head.call(), grad_T, saved, head.needs)
    return [gradient for gradient in gradients if gradient is not None]


@linear_logp_backward.register_fake
def _(grad_T, saved, *arguments):
    head = _Head(*arguments)
    inputs = head.hidden_TD, head.weight_VD, head.bias
    return [x.new_empty(x.shape) for x, need in zip(inputs, head.needs) if need]


def _head_context(ctx, inputs, output) -> None:
    head = _Head(*inputs)
    tensors = head[:4]
    if "direction" in head.saved_names:  # its backward is a product of rows
        tensors = (None,) * 4
    ctx.scalars = head[4:]
    ctx.save_for_backward(*tensors, *output[len(output) - len(head.saved_names) :])
    ctx.set_materialize_grads(False)


def _head_backward(ctx, gradients):
    head, saved = _Head(*ctx.saved_tensors[:4], *ctx.scalars), ctx.saved_tensors[4:]
    grad_T, dH, dW, db = gradients[0], None, None, None
    if grad_T is not None and "direction" in head.saved_names:
        dH = scaled_direction(saved[0], grad_T)
    elif grad_T is not None:
        found = iter(torch.ops.dpo_fast.linear_logp_backward(grad_T, saved, *head))
        dH, dW, db = (next(found) if need else None for need in head.needs)
    return dH, dW, None, db, *(None,) * len(ctx.scalars)


linear_logp.register_autograd(once_differentiable(_head_backward), setup_context=_head_context)


@torch.library.custom_op("dpo_fast::logits_logp", mutates_args=())
def logits_logp(
    logits_TV: Tensor, targets: Tensor, temperature: float, implementation: str
) -> tuple[Tensor, Tensor]:
    """logp [T], and what normalises each row, [T, 2]."""
    check_targets(targets, logits_TV.shape[-1])
    return logits_forward(logits_TV, targets, temperature, implementation)


@logits_logp.register_fake
def _(logits_TV, targets, temperature, implementation):
    dtype = torch.promote_types(logits_TV.dtype, torch.float32)
    T = len(targets)
    return targets.new_empty(T, dtype=dtype), targets.new_empty(T, 2, dtype=dtype)


@torch.library.custom_op("dpo_fast::logits_logp_backward", mutates_args=())
def logits_logp_backward(
    grad: Tensor,
    logits_TV: Tensor,
    targets: Tensor,
    norm: Tensor,
    temperature: float,
    implementation: str,
) -> Tensor:
    return logits_gradient(grad, logits_TV, targets, norm, temperature, implementation)


@logits_logp_backward.register_fake
def _(grad, logits_TV, targets, norm, temperature, implementation):
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


logits_logp.register_autograd(once_differentiable(_logits_backward), setup_context=_logits_context)
