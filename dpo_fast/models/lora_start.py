"""Adapters that start with the principal part of each weight: PiSSA (arXiv 2404.02948), OLoRA (2406.01775).

Both train s B A on the residue W - s B0 A0, where B0 A0 is the principal part of W. peft writes the residue
over W. Here W stays, and a second adapter that is not trained subtracts s B0 A0: the same function, with
the same gradients. With adapters off the model is the one that it was, bit for bit, also where W is
quantised or sharded; and the export is a plain adapter of twice the rank, [B | -B0] [A ; A0]. What the two
add is summed before it is added to W x: in bf16 (W x + d) - d is not W x.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

TRAINED = "default"
TAKEN = "taken"  # the adapter that subtracts what the trained one started with


@torch.no_grad()
def take_from_base(model: nn.Module, how: str) -> None:
    """Start the adapter of a PeftModel with the principal part of the weights, and subtract it beside.

    how: `init_lora_weights` of peft, `pissa`, `pissa_niter_N` or `olora`. On the meta device only names and
    shapes are made.

    Raises:
        ValueError: an adapter is on a layer that is no product with a matrix.
    """
    plain = replace(
        copy.deepcopy(model.peft_config[TRAINED]), modules_to_save=None, lora_dropout=0.0
    )
    plain.ensure_weight_tying, plain.trainable_token_indices, plain.bias = False, None, "none"
    model.add_adapter(TAKEN, plain, autocast_adapter_dtype=False)
    cancel_first(model, TRAINED)
    for name, layer in model.named_modules():
        if TRAINED not in getattr(layer, "lora_A", {}):
            if TRAINED in getattr(layer, "lora_embedding_A", {}):
                raise ValueError(
                    f"init_lora_weights={how} is for linear layers, and {name} is none"
                )
            continue
        first, second = _principal(layer, how)
        for adapter, sign in ((TRAINED, 1), (TAKEN, -1)):
            inner, outer = _factors(layer, adapter)
            inner.data.copy_(first)
            outer.data.copy_(sign * second)


def cancel_first(model: nn.Module, adapter: str) -> None:
    """Have an adapter and `TAKEN` be summed before they are added, where both are on a layer."""
    for layer in model.modules():
        if {adapter, TAKEN} <= getattr(layer, "lora_A", nn.ModuleDict()).keys():
            layer.lora_variant |= {adapter: _Difference, TAKEN: _Difference}


class _Difference:
    """What peft's layers call in place of their own sum (a `LoraVariant`); weights are never merged so."""

    @staticmethod
    def forward(
        module: nn.Module, active_adapter: str, x: Tensor, result: Tensor, **_: Any
    ) -> Tensor:
        """x [..., in], result [..., out]: the product of the layer and of adapters before."""
        if active_adapter == TAKEN:  # it was added with the other one
            return result
        added = _added(module, active_adapter, x)
        if TAKEN in module.active_adapters:
            added = added + _added(module, TAKEN, x)
        return result + added


def _added(layer: nn.Module, adapter: str, x: Tensor) -> Tensor:
    inner, outer = _parts(layer, adapter)
    return outer(inner(layer.lora_dropout[adapter](x))) * layer.scaling[adapter]


def _principal(layer: nn.Module, how: str) -> tuple[Tensor, Tensor]:
    """A [r, in] and B [out, r] that peft would start a layer's adapter with, fp32; W stays as it is."""
    from peft import LoraConfig
    from peft.tuners.lora.layer import Linear
    from peft.utils.integrations import dequantize_module_weight

    rank, alpha = layer.r[TRAINED], layer.lora_alpha[TRAINED]
    base = layer.get_base_layer()
    if base.weight.is_meta:
        return _factors(layer, TRAINED)
    with _whole(base.weight):
        weight = dequantize_module_weight(base).detach().to(torch.float32, copy=True)
    weight = weight.T if getattr(layer, "fan_in_fan_out", False) else weight
    scratch = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    scratch.weight = nn.Parameter(weight.contiguous())
    config = LoraConfig(
        r=rank, lora_alpha=alpha, use_rslora=layer.use_rslora[TRAINED], init_lora_weights=how
    )
    made = Linear(scratch, TRAINED, config=config, r=rank, lora_alpha=alpha)
    first, second = _factors(made, TRAINED)
    if first.shape[0] != rank:
        raise ValueError(f"a rank of {rank} is more than a weight of {tuple(weight.shape)} has")
    return first, second


def _factors(layer: nn.Module, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
    """A and B of an adapter on a layer."""
    inner, outer = (part.weight for part in _parts(layer, adapter))
    return inner, outer


def _parts(layer: nn.Module, adapter: str) -> list[nn.Module]:
    return [getattr(layer, f"lora_{part}")[adapter] for part in "AB"]


def _whole(weight: nn.Parameter) -> contextlib.AbstractContextManager:
    if not hasattr(weight, "ds_id"):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([weight])


def is_taken(name: str) -> bool:
    """Whether a tensor of a PeftModel is of the adapter that subtracts."""
    return f".{TAKEN}." in name


def plain_adapter(state: Mapping[str, Tensor], config: Any) -> tuple[dict[str, Tensor], Any]:
    """Trained tensors and configuration as an adapter on the base itself.

    state: with the tensors of `TAKEN`, by their names in the model.
    config: of the trained adapter (peft's); it stays as it is.
    """
    joined = {}
    for name, value in state.items():
        if is_taken(name):
            continue
        taken = state.get(name.replace(f".{TRAINED}.", f".{TAKEN}."))
        if taken is None or taken is value:
            joined[name] = value
            continue
        joined[name] = torch.cat([value, taken], 0 if ".lora_A." in name else 1)
    config = copy.deepcopy(config)
    grown = math.sqrt(2) if config.use_rslora else 2  # alpha / sqrt(r), or alpha / r, is as it was
    config.init_lora_weights = True
    config.r, config.lora_alpha = 2 * config.r, grown * config.lora_alpha
    config.rank_pattern = {name: 2 * rank for name, rank in config.rank_pattern.items()}
    config.alpha_pattern = {name: grown * alpha for name, alpha in config.alpha_pattern.items()}
    return joined, config
