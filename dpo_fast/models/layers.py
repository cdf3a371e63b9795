"""How decoder layers run: liger-kernel, torch.compile, activation checkpointing.

Layers change in place. They compute the same, and their weights keep their names.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import os
import shutil
import sys

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from dpo_fast.errors import UserError
from dpo_fast.models.config import ModelSection
from dpo_fast.models.decoder import decoder_of
from dpo_fast.ops.dispatch import interpreting

# The activations that liger's fused MLPs compute, whatever the model's configuration says.
LIGER_ACTIVATIONS = {
    "swiglu": ("silu", "swish"),
    "geglu": ("gelu_pytorch_tanh",),
    "relu_squared": ("relu2",),
}
# The head is ours; liger would put a forward of its own round it.
LIGER_WITHOUT = {"cross_entropy": False, "fused_linear_cross_entropy": False}


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder's layers from first to last, as transformers marks them."""
    modules = decoder_of(model).modules()
    return [module for module in modules if isinstance(module, GradientCheckpointingLayer)]


def check_layers(section: ModelSection, model: PreTrainedModel, device: torch.device) -> None:
    """Check the options of `section` that concern the layers. A model on the meta device will do.

    Raises:
        UserError: an option cannot be honoured for this model or on this device.
    """
    if section.use_liger_kernel:
        _refuse("model.use_liger_kernel=true", _why_not_liger(model.config, device))
    if section.torch_compile:
        _refuse("model.torch_compile=true", _why_not_compile(model))
    if section.gradient_checkpointing:
        _refuse("model.gradient_checkpointing=true", _why_not_checkpoint(model))
    checkpointed_layers(model, section.checkpoint_layers)


def _refuse(option: str, obstacle: str | None) -> None:
    if obstacle:
        raise UserError(f"{option} cannot be honoured: {obstacle}")


def _why_not_liger(config: PretrainedConfig, device: torch.device) -> str | None:
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed: pip install liger-kernel, or leave the option out"
    if device.type == "cpu" and not interpreting():
        return "its kernels are Triton's and need a GPU: leave the option out on a CPU"
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as KNOWN

    if config.model_type not in KNOWN:
        return (
            f"liger-kernel has no layers for models of type {config.model_type}: leave the option "
            "out, or set model.torch_compile=true instead"
        )
    text = config.get_text_config()
    used = getattr(text, "hidden_activation", None) or getattr(text, "hidden_act", None)
    for name in inspect.signature(KNOWN[config.model_type]).parameters:
        if used not in LIGER_ACTIVATIONS.get(name, (used,)):
            return (
                f"its {name} computes {LIGER_ACTIVATIONS[name][0]}, the model's activation is {used}: "
                "leave the option out, or set model.torch_compile=true instead"
            )
    return None


def _why_not_compile(model: PreTrainedModel) -> str | None:
    if not decoder_layers(model):
        return f"{type(model).__name__} does not mark its decoder layers: leave the option out"
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++")):
        return "torch.compile needs a C++ compiler and found none: install g++, or leave it out"
    return None


def _why_not_checkpoint(model: PreTrainedModel) -> str | None:
    if model.supports_gradient_checkpointing:
        return None
    return f"{type(model).__name__} does not support it: set model.gradient_checkpointing=false"


def use_liger_kernel(model: PreTrainedModel) -> None:
    """Give a loaded model liger's RMSNorm, MLP and RoPE; its forward and its head stay as they are.

    Norms and MLPs of this instance alone are changed. RoPE is a function of transformers' module,
    so later models of this architecture use liger's as well, as long as the process lives.
    """
    from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

    with _classes_restored(type(model).__module__):
        _apply_liger_kernel_to_instance(model, **LIGER_WITHOUT)


@contextlib.contextmanager
def _classes_restored(module: str):
    """Undoes liger's change to the classes, which models built afterwards would be made of."""
    names = vars(sys.modules[module])
    before = {name: value for name, value in names.items() if inspect.isclass(value)}
    yield
    names.update(before)


def compile_layers(model: PreTrainedModel, backend: str = "inductor") -> None:
    """Regional compilation: the blocks of every decoder layer (attention, norms, MLP), in place.

    Layers are alike, so each kind of block is compiled once, for any length. Attention over packed
    sequences stays outside, as a break in its block's graph. The layer round the blocks is not
    compiled: checkpointing works on its forward, and cannot span a break.
    """
    for layer in decoder_layers(model):
        for block in layer.children():
            block.compile(dynamic=True, backend=backend)


def checkpointed_layers(model: PreTrainedModel, choice: int | list[int] | None) -> list[int]:
    """The layers that `model.checkpoint_layers` means: the first so many, those listed, or all.

    Raises:
        UserError: the model has no such layers.
    """
    count = len(decoder_layers(model))
    if choice is None:
        return list(range(count))
    chosen = list(range(choice)) if isinstance(choice, int) else sorted(set(choice))
    if chosen[-1] >= count:
        raise UserError(
            f"model.checkpoint_layers={choice}: the model has {count} decoder layers; name at most "
            f"{count} of them, or indices from 0 to {count - 1}"
        )
    return chosen


def checkpoint_layers(
    model: PreTrainedModel, choice: int | list[int] | None = None, offload: bool = False
) -> None:
    """Keep only the inputs of the chosen layers; recompute their inside in the backward pass.

    offload: the inputs wait in CPU memory, pinned where there is a GPU.
    """
    # transformers 5.0 has the second name alone; later versions warn that it will go.
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    chosen = set(checkpointed_layers(model, choice))
    for index, layer in enumerate(decoder_layers(model)):
        layer.gradient_checkpointing = index in chosen
        if offload:
            layer._gradient_checkpointing_func = _checkpoint_with_input_in_cpu_memory


def _checkpoint_with_input_in_cpu_memory(function, *inputs):
    """torch's checkpoint. What the function keeps inside is none of the saved tensors that are moved."""
    with torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available()):
        return checkpoint(function, *inputs, use_reentrant=False)
