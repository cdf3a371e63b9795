"""Attention over a row of trees, by several backends, registered with transformers by name.

A backend takes query [1, heads, N, dim], key and value [1, key heads, N, dim] and gives
[1, N, heads, dim]. Its `plan` says which tokens see which. It honours a layer's sliding window, soft
cap and sinks, or refuses them by name.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from functools import partial
from types import EllipsisType

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AttentionInterface

from dpo_fast.data.layouts import layouts_with
from dpo_fast.errors import UserError
from dpo_fast.models.attention_plan import AttentionPlan, Varlen
from dpo_fast.models.attention_sdpa import sdpa
from dpo_fast.models.attention_untold import Local, local_of, with_temperature
from dpo_fast.models.ulysses import cause

# Names for transformers, which takes any with sdpa, flex or flash in it for one of its own.
NAMES = {
    "sdpa": "dpo_fast_packed",
    "flex_attention": "dpo_fast_any_mask",
    "varlen": "dpo_fast_varlen",
    "flash_attention_2": "dpo_fast_fa2",
    "flash_attention_3": "dpo_fast_fa3",
}


def flex_attention(
    plan: AttentionPlan,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """FlexAttention: one kernel for any mask, window, cap and sinks."""
    from torch.nn.attention.flex_attention import AuxRequest

    cap = None
    if softcap is not None:
        # A captured float would be read from a tensor within the program, which inductor cannot lower.
        bound = torch.full((), softcap, device=query.device)

        def cap(score, batch, head, q, k):
            return bound * torch.tanh(score / bound)

    if window is not None and plan.longest <= window:
        window = None
    # On a CPU the kernel has no backward. Tests use its uncompiled forward, plain PyTorch.
    compute = _flex_kernel() if query.is_cuda else _flex()
    output, auxiliary = compute(
        query,
        key,
        value,
        score_mod=cap,
        block_mask=plan.block_mask(window),
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
        return_aux=AuxRequest(lse=True),
    )
    if sinks is not None:
        share = torch.sigmoid(auxiliary.lse - sinks.float().view(1, -1, 1))
        output = output * share.unsqueeze(-1).to(output.dtype)
    return output.transpose(1, 2)


def _flex() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention as compute

    return compute


# Programs that one process may have: of every kind of mask, with and without a cap, with and without
# gradients, for rows of one block and of several. torch's own limit is 8.
FLEX_PROGRAMS = 64


@functools.cache
def _flex_kernel() -> Callable:
    """FlexAttention's kernel. Past the limit it is an error: torch alone would write out all scores."""
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, FLEX_PROGRAMS)
    return torch.compile(_flex(), dynamic=True, fullgraph=True)


def varlen(
    kernel: Callable[..., Tensor],
    plan: AttentionPlan,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    **options,
) -> Tensor:
    """A kernel for sequences of unequal length, after gathering each segment's keys and values.

    kernel(q, k, v, arguments, **options) takes q [N, heads, dim], and k and v
    [gathered keys, key heads, dim].
    """
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    short = q.shape[-1] - v.shape[-1]  # these kernels want one head size for all three
    v = pad(v, (0, short)) if short else v
    outputs, calls = [], plan.varlen_calls
    for arguments in calls:
        own = [q, k, v]
        for place, rows in enumerate((arguments.rows, arguments.keys, arguments.keys)):
            own[place] = own[place] if rows is None else own[place].index_select(0, rows)
        outputs.append(kernel(*own, arguments, **options))
    output = outputs[0]
    if calls[0].rows is not None:
        places = torch.cat([each.rows for each in calls]).argsort()
        output = torch.cat(outputs).index_select(0, places)
    return output[None, ..., : output.shape[-1] - short]


def pytorch_kernel(q, k, v, arguments: Varlen, *, scale, window, softcap, sinks) -> Tensor:
    """torch.nn.attention.varlen, PyTorch's own build of flash-attention (from 2.11 on)."""
    from torch.nn.attention.varlen import varlen_attn

    _refuse_if("varlen", softcap=softcap, sinks=sinks)
    # 2.11 takes grouped heads as they are; later versions want to be told.
    told = "enable_gqa" in varlen_attn.__kwdefaults__
    grouped = {"enable_gqa": q.shape[1] != k.shape[1]} if told else {}
    return varlen_attn(
        q,
        k,
        v,
        arguments.cu_seq_q,
        arguments.cu_seq_k,
        arguments.max_q,
        arguments.max_k,
        scale=scale,
        window_size=(-1 if window is None else window - 1, -1 if arguments.both_ways else 0),
        **grouped,
    )


def flash_kernel(name: str, q, k, v, arguments: Varlen, *, scale, window, softcap, sinks) -> Tensor:
    """flash-attn's varlen function, of version 2 or 3."""
    _refuse_if(name, sinks=sinks)
    output = _flash_function(name)(
        q,
        k,
        v,
        arguments.cu_seq_q,
        arguments.cu_seq_k,
        max_seqlen_q=arguments.max_q,
        max_seqlen_k=arguments.max_k,
        softmax_scale=scale,
        causal=not arguments.both_ways,
        window_size=(-1, -1) if window is None else (window - 1, -1 if arguments.both_ways else 0),
        softcap=softcap or 0.0,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return output[0] if isinstance(output, tuple) else output


@functools.cache
def _flash_function(name: str) -> Callable:
    if name == "flash_attention_3":
        from flash_attn_interface import flash_attn_varlen_func
    else:
        from flash_attn import flash_attn_varlen_func
    return flash_attn_varlen_func


def _refuse_if(name: str, **features) -> None:
    words = {"softcap": "soft-capped scores", "sinks": "sinks"}
    for feature, value in features.items():
        if value is not None:
            raise UserError(
                f"model.attention={name} cannot be honoured: this model's attention has "
                f"{words[feature]}, which it does not know. Set model.attention=flex_attention or sdpa"
            )


# Positions of tokens. Rotary embeddings are applied before attention is called, so it ignores them.
POSITIONS = ("position_ids", "cache_position")
BACKENDS: dict[str, Callable[..., Tensor]] = {
    "sdpa": sdpa,
    "flex_attention": flex_attention,
    "varlen": partial(varlen, pytorch_kernel),
    "flash_attention_2": partial(varlen, partial(flash_kernel, "flash_attention_2")),
    "flash_attention_3": partial(varlen, partial(flash_kernel, "flash_attention_3")),
}


def has_varlen() -> bool:
    """Whether this PyTorch has varlen attention with windows: 2.11 and later."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return {"window_size", "scale"} <= set(inspect.signature(varlen_attn).parameters)


def _interface(compute: Callable[..., Tensor]) -> Callable:
    """A backend as a function of transformers' AttentionInterface."""

    @torch.compiler.disable  # it loops over sequences; the layers round it are worth compiling
    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        plan: AttentionPlan | None = None,
        sliding_window: int | None | EllipsisType = ...,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **others,
    ) -> tuple[Tensor, None]:
        group = None if plan is None else plan.group
        _refuse_unknown_inputs(module, attention_mask, dropout, others, group)
        if plan is None:
            raise UserError(
                "this attention serves sequences that share a row, and got no plan of the row. "
                f"In training: {type(module).__name__} does not get the keywords that the model is "
                f"called with, so set train.layout={layouts_with(shares_rows=False)}. Otherwise call "
                'model.set_attn_implementation("sdpa") before the model is used. In a callback that is '
                "all; in a loop of your own set it back before it is trained further, or sequences of a "
                "row would see each other"
            )
        local = local_of(module) if sliding_window is ... else Local(sliding_window)
        query, key, value = _autocast(with_temperature(module, query, plan), key, value)
        if group is not None:
            query, key, value = group.to_heads(query, key, value)
            s_aux = None if s_aux is None else group.of_own_heads(s_aux)
        output = compute(
            plan.of_layer(local.window) if local.chunk is None else plan.chunked(local.chunk),
            query,
            key,
            value,
            scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
            window=local.window,
            softcap=softcap,
            sinks=s_aux,
        )
        if group is not None:
            output = group.to_tokens(output)
        return output.contiguous(), None

    return attention


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast all in its dtype, as PyTorch's SDPA has it: rotary embeddings and norms give fp32.

    Kernels that are called directly get what they are given, and want one dtype.
    """
    kind = tensors[0].device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def _refuse_unknown_inputs(module, attention_mask, dropout, others, group=None) -> None:
    """Raises UserError for an input that would change attention beyond the causal plan.

    Any tensor of an unknown name is one: sparse attention's `indices`, a `position_bias`, sinks
    under another name.
    """
    reasons = obstacles(module, attention_mask, others)
    reasons += ["dropout"] if dropout else []
    if reasons:
        layouts = (layouts_with(shares_rows=True), layouts_with(shares_rows=False))
        option, remedy = cause(*layouts, group)
        raise UserError(
            f"{option} cannot be honoured: this model's attention "
            f"({type(module).__name__}) has {' and '.join(reasons)}. Set {remedy}"
        )


def obstacles(module: nn.Module, attention_mask: Tensor | None, others: dict) -> list[str]:
    """What a layer's attention has that would change it beyond the causal plan."""
    unknown = [
        name
        for name, value in others.items()
        if isinstance(value, Tensor) and name not in POSITIONS
    ]
    ahead = others.get("is_causal") is False or getattr(module, "is_causal", True) is False
    found = {
        "a mask of its own": attention_mask is not None,
        f"an input that is not known here ({', '.join(unknown)})": bool(unknown),
        "layers that look ahead": ahead,
    }
    return [reason for reason, there in found.items() if there]


# No maker of masks is registered beside them: the plan says which tokens see which. With one, even if it
# made none, transformers would read positions back from the device in every forward.
for _backend, _compute in BACKENDS.items():
    AttentionInterface.register(NAMES[_backend], _interface(_compute))
