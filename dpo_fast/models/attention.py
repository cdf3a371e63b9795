"""Attention over packed sequences: each sees itself alone. Registered with transformers by name."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.utils import is_flash_attn_2_available

from dpo_fast.errors import UserError

PACKED = "dpo_fast_packed"


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    segments: tuple[int, ...] | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Causal SDPA within each of `segments`, lengths along the token dimension of [1, heads, N, dim].

    Returns [1, N, heads, dim] as transformers expects. Work grows with the squares of the sequence
    lengths, not with that of the pack. A layer that needs more than plain causal attention is refused.
    """
    if segments is None:
        segments = (query.shape[2],)
    _refuse(kwargs, max(segments))
    groups = query.shape[1] // key.shape[1]
    outputs = [
        torch.nn.functional.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=groups > 1
        )
        for q, k, v in zip(*(x.split(segments, dim=2) for x in (query, key, value)))
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _refuse(options: dict, longest: int) -> None:
    window = options.get("sliding_window")
    reason = None
    if window is not None and longest > window:
        reason = f"a sliding window of {window} tokens is shorter than a sequence of {longest}"
    elif options.get("softcap") is not None:
        reason = "attention scores have a soft cap"
    elif options.get("s_aux") is not None:
        reason = "attention has sinks"
    if reason:
        raise UserError(
            f"train.layout=packed cannot be honoured here: {reason}. Set train.layout=padded with "
            "model.attention=eager, or install flash-attn and set model.attention=flash_attention_2."
        )


def _no_mask(*args, **kwargs) -> None:
    """The segments say it all."""


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, _no_mask)


def check_packing(model: PreTrainedModel) -> None:
    """Packed sequences are kept apart by attention alone; a layer that mixes tokens otherwise is not.

    Raises:
        UserError: the model has recurrent or convolutional layers, attention of its own making, or no
            `position_ids`.
    """
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    others = kinds - {"full_attention", "sliding_attention"}
    reason = None
    if others or model._is_stateful:
        reason = (
            f"it has layers that carry state along the tokens ({', '.join(others) or 'recurrent'})"
        )
    elif not model._supports_attention_backend:
        reason = "it does not take its attention from transformers' AttentionInterface"
    elif "position_ids" not in inspect.signature(model.get_decoder().forward).parameters:
        reason = "its forward takes no position_ids, so every sequence would go on from the last"
    if reason:
        raise UserError(
            f"train.layout=packed cannot be honoured for {type(model).__name__}: {reason}. Set "
            "train.layout=padded"
        )


def choose_attention(requested: str, layout: str, device: torch.device) -> str:
    """The name to give transformers for `model.attention` and `train.layout`.

    Raises:
        UserError: the named implementation would let packed sequences see each other.
    """
    flash = requested.startswith("flash_attention")
    if flash and device.type == "cpu":
        raise UserError(
            f"model.attention={requested} does not run on a CPU: use auto, sdpa or eager"
        )
    if layout == "padded":
        return "sdpa" if requested == "auto" else requested
    if requested == "auto":
        return "flash_attention_2" if _flash_runs(device) else PACKED
    if requested == "sdpa":
        return PACKED
    if not flash:
        raise UserError(
            f"model.attention={requested} cannot keep packed sequences apart: set "
            "train.layout=padded, or model.attention=auto, sdpa or flash_attention_2"
        )
    return requested


def _flash_runs(device: torch.device) -> bool:
    return device.type == "cuda" and is_flash_attn_2_available()
