"""Which parts of a model adapters may be put on: tensors of experts yes, some routers not.

Nor what is beside the text model and frozen.
"""

from __future__ import annotations

import dis
import functools
import inspect
from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel

from dpo_fast.errors import UserError
from dpo_fast.models.decoder import decoder_of, other_senses
from dpo_fast.models.routers import routers_of

LAYERS = (nn.Linear, nn.Conv1d)  # what peft's LoRA is put on
GROUPED = ("GroupedLinear",)  # ends of names of layers with a product for each group of features
# Layers whose weight is read in training, and which are called otherwise.
PASSED_BY = {"Gemma3nTextAltUp": frozenset({"correction_coefs"})}


def check_parameters(model: PreTrainedModel, names: Sequence[str], dropout: float) -> None:
    """Check `model.lora.target_parameters`, which peft passes over where there is no such parameter.

    Raises:
        UserError: a name is of no matrix, or stack of matrices, that texts go through; or there is dropout.
    """
    if names and dropout:
        raise UserError(
            f"model.lora.dropout={dropout} cannot be honoured with model.lora.target_parameters={names}: "
            "an adapter on a parameter changes the weight, and sees no input to drop from; set it to 0"
        )
    known = {name: _dimensions(value) for name, value in decoder_of(model).named_parameters()}
    for name in names:
        found = {key: size for key, size in known.items() if f".{key}".endswith(f".{name}")}
        if not any(size in (2, 3) for size in found.values()):
            ends = sorted(
                {".".join(key.split(".")[-2:]) for key, size in known.items() if size == 3}
            )
            stacks = f"; tensors of experts are {', '.join(ends)}" if ends else ""
            raise UserError(
                f"model.lora.target_parameters={name}: the model has no such weight{stacks}. Layers with a "
                "weight of their own are named in model.lora.target_modules"
            )


def expert_tensors(model: PreTrainedModel) -> list[str]:
    """Names of parameters that hold all experts of a layer, as `target_parameters` takes them."""
    parameters = decoder_of(model).named_parameters()
    stacks = (name for name, value in parameters if _dimensions(value) == 3 and "expert" in name)
    return sorted({".".join(name.split(".")[-2:]) for name in stacks})


def linear_routers(model: PreTrainedModel) -> list[str]:
    """Names of linear layers of a kind that returns another thing than its product.

    These are routers, as Llama 4's, and layers that multiply groups of features, as DeepSeek-V4's. peft
    takes them for plain layers, and an adapter cannot be added to what they return.
    """
    found = {id(router) for router, _ in routers_of(model) if isinstance(router, nn.Linear)}
    found |= {id(each) for each in model.modules() if type(each).__name__.endswith(GROUPED)}
    return [name for name, module in model.named_modules() if id(module) in found]


def frozen_beside(model: PreTrainedModel, targets: str | Sequence[str]) -> list[str]:
    """Names of layers beside the decoder, of a vision tower say, that targets mean and that are frozen.

    A regular expression means what it says.
    """
    everything = targets == "all-linear"
    if isinstance(targets, str) and not everything:
        return []
    ends = tuple(f".{target}" for target in targets)
    inside = {id(module) for module in decoder_of(model).modules()}
    inside.add(id(model.get_output_embeddings()))
    return [
        name
        for name, module in model.named_modules()
        if id(module) not in inside
        and (isinstance(module, nn.Linear) if everything else f".{name}".endswith(ends))
        and not any(parameter.requires_grad for parameter in module.parameters())
    ]


def check_no_router(model: PreTrainedModel, targets: str | Sequence[str]) -> None:
    """Raises UserError if targets by name mean such a router."""
    named = [targets] if isinstance(targets, str) else targets
    routers = {name.split(".")[-1] for name in linear_routers(model)}
    if hit := routers & {target.split(".")[-1] for target in named}:
        raise UserError(
            f"model.lora.target_modules={targets}: routers or layers of groups of {type(model).__name__} "
            f"({', '.join(hit)}) return more than the product of a linear layer, and cannot carry an "
            "adapter; leave them out"
        )


def layers_never_called(model: PreTrainedModel) -> list[str]:
    """Names of layers whose weight is read by the module that they are in, which does not call them.

    An adapter would be passed by: of Jamba's dt_proj always, of Mamba-2's out_proj where mamba-ssm's kernel
    computes the whole layer in training, of LongCat's router. peft refuses this for some model types.
    """
    found = []
    for name, module in model.named_modules():
        children = dict(module.named_children())
        layers = {each for each, child in children.items() if isinstance(child, LAYERS)}
        if not layers:
            continue
        read, used = _weights_read(type(module))
        # A mixer with a convolution calls a layer in one of its ways, and passes by it in another.
        if not any(isinstance(child, nn.Conv1d) for child in children.values()):
            read = (read - used) | PASSED_BY.get(type(module).__name__, frozenset())
        found += [f"{name}.{each}" for each in sorted(read & layers)]
    return found


def without_gradient(model: PreTrainedModel, images: bool = False) -> list[str]:
    """Names of modules of the decoder that choose keys, or that texts alone do not come by.

    images: whether images are trained on.
    """
    decoder = decoder_of(model)
    beside = [] if images else [*other_senses(decoder), *_layers_for_images(model)]
    dead = {id(part) for module in beside for part in module.modules()}
    names = {id(module): name for name, module in model.named_modules()}
    for module in decoder.modules():
        if type(module).__name__.endswith("Indexer"):
            dead |= {id(part) for part in module.modules()}
    return [name for key, name in names.items() if key in dead]


def _layers_for_images(model: PreTrainedModel) -> list[nn.Module]:
    """Decoder layers that are passed over where there is no image: those of Llama 3.2."""
    among = getattr(model.config.get_text_config(), "cross_attention_layers", None) or []
    layers = getattr(decoder_of(model), "layers", None)
    return [layer for index, layer in enumerate(layers or ()) if index in among]


def check_called(model: PreTrainedModel, targets: str | Sequence[str]) -> None:
    """Raises UserError if targets by name mean a layer that is never called."""
    named = {targets} if isinstance(targets, str) else {*targets}
    never = {name.split(".")[-1] for name in layers_never_called(model)}
    if hit := never & {target.split(".")[-1] for target in named}:
        raise UserError(
            f"model.lora.target_modules={targets}: the mixers of {type(model).__name__} read the weights "
            f"of {', '.join(sorted(hit))} and pass by adapters on them; leave them out, or name all-linear"
        )


@functools.cache
def _weights_read(kind: type[nn.Module]) -> tuple[frozenset[str], frozenset[str]]:
    """Parts whose weight the forward of a class takes for itself, and those that it takes otherwise.

    `self.part.weight` is the first, but for its dtype; `self.part(x)` the second.
    """
    code = list(dis.get_instructions(inspect.unwrap(kind.forward)))
    steps = [each.argval for each in code] + [None, None]
    about = {"dtype", "device", "shape"}
    read, used = set(), set()
    for owner, part, value, then in zip(steps, steps[1:], steps[2:], steps[3:]):
        if owner == "self" and isinstance(part, str):
            (read if value == "weight" and then not in about else used).add(part)
    return frozenset(read), frozenset(used)


def _dimensions(parameter: nn.Parameter) -> int:
    return len(getattr(parameter, "ds_shape", parameter.shape))
