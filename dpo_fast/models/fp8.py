"""`model.fp8`: the decoder's products in 8-bit floats, by torchao's float8 training.

Weights, gradients and what the optimiser keeps stay in their dtype, and have their names: inputs, weights
and gradients are rounded for each product alone, with scales that come from their values. The head, the
log-probs, embeddings, norms, attention and routers are as they are.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os

import torch
from torch import nn
from transformers import PreTrainedModel

from dpo_fast.errors import UserError
from dpo_fast.models.config import ModelSection
from dpo_fast.models.layers import decoder_layers
from dpo_fast.models.routers import routers_of

# The compute capability of a GPU that a recipe of torchao needs.
CAPABILITIES = {"tensorwise": (8, 9), "rowwise": (9, 0), "rowwise_with_gw_hp": (9, 0)}
UNIT = 16  # what both sides of a matrix must be multiples of
EMULATE = "DPO_FAST_EMULATE_PRODUCTS"


def emulating() -> bool:
    """Whether products are rounded and then computed in the dtype of the weights, on any device."""
    return os.environ.get(EMULATE, "0") == "1"


def check_fp8(section: ModelSection, model: PreTrainedModel, device: torch.device) -> None:
    """Check `model.fp8` for a model, which may be on the meta device, and for a device.

    Raises:
        UserError: it cannot be honoured.
    """
    if section.fp8 is None:
        return
    if obstacle := _why_not(section, model, device):
        raise UserError(f"model.fp8={section.fp8} cannot be honoured: {obstacle}")


def _why_not(section: ModelSection, model: PreTrainedModel, device: torch.device) -> str | None:
    if section.quantization is not None or getattr(model.config, "quantization_config", None):
        return "the weights of this model are quantised, and their layers compute otherwise: leave it out"
    if importlib.util.find_spec("torchao") is None:
        return "torchao is not installed: pip install torchao, or leave the option out"
    if not emulating():
        if device.type != "cuda" or torch.version.hip:
            return "its products need a GPU of NVIDIA's: leave the option out here"
        least, found = CAPABILITIES[section.fp8], torch.cuda.get_device_capability(device)
        if found < least:
            other = ", or set model.fp8=tensorwise" if found >= CAPABILITIES["tensorwise"] else ""
            return (
                f"it needs compute capability {least[0]}.{least[1]} (Hopper has 9.0), and this GPU has "
                f"{found[0]}.{found[1]}: leave the option out{other}"
            )
        if section.precision != "bf16":
            return f"its products give bf16, and model.dtype is {section.precision}: set model.dtype=bf16"
    if not fp8_layers(model):
        return (
            f"the decoder layers of {type(model).__name__} have no linear layer whose sides are multiples "
            f"of {UNIT}; experts in one tensor are none: leave the option out"
        )
    return None


def fp8_layers(model: PreTrainedModel) -> list[str]:
    """Names of the linear layers inside the decoder layers whose products are computed in fp8."""
    apart = {id(part) for router, _ in routers_of(model) for part in router.modules()}
    inside = {id(part) for layer in decoder_layers(model) for part in layer.modules()} - apart
    return [
        name
        for name, module in model.named_modules()
        # Of the class itself: layers that are quantised, or compute more, are kinds of it.
        if type(module) is nn.Linear
        and id(module) in inside
        and module.in_features % UNIT == module.out_features % UNIT == 0
    ]


def use_fp8(model: PreTrainedModel, recipe: str) -> list[str]:
    """Have the layers of `fp8_layers` compute in fp8, in place; returns their names.

    recipe: a name of torchao's, which says how many values share a scale.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    # The product that gives a weight's gradient goes along the tokens, which are any number.
    options = {"pad_inner_dim": True, "emulate": emulating()}
    config = dataclasses.replace(Float8LinearConfig.from_recipe_name(recipe), **options)
    names = fp8_layers(model)
    known = set(names)
    convert_to_float8_training(
        model, config=config, module_filter_fn=lambda module, name: name in known
    )
    return names


def in_fp8(module: nn.Module) -> bool:
    """Whether `use_fp8` has made a layer. torchao is not imported for those that it has not."""
    return type(module).__name__ == "Float8Linear"
