"""What `model.lora.target_modules=all-linear` means: layers that texts go through, and tensors of experts.

peft takes every linear layer but the head. For families whose experts were layers once, such as Mixtral, it
adds the tensors that hold them now, and their routers, as parameters (`target_parameters`).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dpo_fast.errors import UserError
from dpo_fast.models.lora_section import LoraSection


@dataclass(frozen=True)
class Targets:
    """What gets adapters, as peft's LoraConfig takes it. modules: whole names, in the model's order."""

    modules: list[str]
    parameters: list[str] = field(default_factory=list)
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, int] = field(default_factory=dict)


def all_linear(model: PreTrainedModel, section: LoraSection, left_out: Iterable[str]) -> Targets:
    """The layers and tensors that all-linear means, but for those that are trained whole.

    Where options are for layers alone, as DoRA is, tensors have no adapters.

    left_out: names of layers that adapters would do nothing for.
    """
    whole = tuple(section.modules_to_save or ())  # ends of names, as peft has them
    trained = [name for name, _ in model.named_modules() if name.endswith(whole)]
    head, left = model.get_output_embeddings(), {*left_out}
    layers = [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
        and module is not head
        and name not in left
        and not _inside(name, trained)
        and _in_layers(name, section)
    ]
    known = _as_peft_has_it(model, section, "all-linear")
    if not known.target_parameters:
        return Targets(layers)
    # A layer whose name an expert had once is taken for it.
    ends = known.target_modules
    layers = [name for name in layers if name.split(".")[-1] in ends]
    if layers_alone(section):
        return Targets(layers)
    kept = [
        name
        for name, _ in model.named_parameters()
        if name.endswith(tuple(f".{each}" for each in known.target_parameters))
        and not _inside(name, trained)
        and _in_layers(name, section)
    ]
    patterns = (
        {p: n for p, n in (named or {}).items() if any(re.fullmatch(p, name) for name in kept)}
        for named in (known.rank_pattern, known.alpha_pattern)
    )
    return Targets(layers, kept, *patterns)


def _in_layers(name: str, section: LoraSection) -> bool:
    """Whether a name is of the layers of `layers_to_transform`: peft passes that by for whole names."""
    layers, patterns = section.layers_to_transform, section.layers_pattern
    if layers is None:
        return True
    patterns = [patterns] if isinstance(patterns, str) else patterns or [r"[^.]*"]
    found = (re.match(rf"(?:.*\.)?{pattern}\.(\d+)\.", name) for pattern in patterns)
    index = next((int(match[1]) for match in found if match), None)
    return index in ([layers] if isinstance(layers, int) else layers)


def layers_alone(section: LoraSection) -> str | None:
    """The option, if there is one, that is for adapters on layers, and not for those on tensors."""
    if section.use_dora:
        return "use_dora=true"
    if section.takes_from_base:
        return f"init_lora_weights={section.init_lora_weights}"
    return f"dropout={section.dropout}" if section.dropout else None


def check_named(model: PreTrainedModel, section: LoraSection) -> None:
    """Check `target_modules` by name where peft takes them for tensors of experts, and routers.

    Raises:
        UserError: an option is for layers alone, or they are to be trained whole as well.
    """
    found = sorted(_as_peft_has_it(model, section, section.target_modules).target_parameters or ())
    found = [name for name in found if name not in (section.target_parameters or ())]
    if not found:
        return
    means = f"model.lora.target_modules={section.target_modules} means {', '.join(found)}"
    if option := layers_alone(section):
        raise UserError(
            f"{means} here, tensors that are no layers, and model.lora.{option} is for layers; leave these "
            "names out (all-linear does), or that option"
        )
    whole = tuple(section.modules_to_save or ())
    for name, _ in model.named_parameters():
        module = next((part for part in _above(name) if part.endswith(whole)), None)
        if module and any(f".{name}".endswith(f".{each}") for each in found):
            raise UserError(
                f"{means} here, and model.lora.modules_to_save={section.modules_to_save} trains {module} "
                "whole; name it in one of the two"
            )


def _as_peft_has_it(
    model: PreTrainedModel, section: LoraSection, targets: str | Sequence[str]
) -> Any:
    """peft's configuration with targets as it makes them of the names; older versions leave them."""
    from peft import LoraConfig

    targets = targets if isinstance(targets, str) else list(targets)
    config = LoraConfig(
        r=section.r,
        lora_alpha=section.alpha,
        target_modules=copy.copy(targets),
        task_type="CAUSAL_LM",
    )
    try:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    except ImportError:
        return config
    try:
        convert_peft_config_for_transformers(config, model, None)
    except ValueError as error:
        raise UserError(
            f"model.lora.target_modules={section.target_modules}: {error}; name both, or all-linear"
        ) from None
    return config


def _inside(name: str, modules: Iterable[str]) -> bool:
    return any(name == each or name.startswith(f"{each}.") for each in modules)


def _above(name: str) -> list[str]:
    """The modules that a parameter lies in, by name, the innermost last."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]
