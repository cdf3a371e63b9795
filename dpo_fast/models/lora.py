"""New adapters on a model, as `model.lora` asks for them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import nn
from transformers import PreTrainedModel

from dpo_fast.errors import UserError
from dpo_fast.models.adapter_targets import (
    check_called,
    check_no_router,
    check_parameters,
    frozen_beside,
    layers_never_called,
    linear_routers,
    without_gradient,
)
from dpo_fast.models.adapters import ADAPTER, activate, first_line, keep_frozen_copy, why_not
from dpo_fast.models.all_linear import Targets, all_linear, check_named
from dpo_fast.models.checkpoint import EMBEDDINGS, HEADS
from dpo_fast.models.decoder import decoder_of
from dpo_fast.models.lora_section import LoraSection
from dpo_fast.models.lora_start import take_from_base


def add_lora(scoring: nn.Module, section: LoraSection, keep_copy: bool = False) -> None:
    """Wrap the backbone's layers with new adapters and freeze everything else but `modules_to_save`.

    Where embeddings and head share a weight, they share the trained copy of it, too.

    keep_copy: also keep a frozen copy of the adapters, for a reference that follows them.

    Raises:
        UserError: modules that cannot have them, such as the head, or that are not there.
    """
    from peft import get_peft_model

    model = scoring.causal_lm
    config = _peft_config(model, section, scoring.vision is not None)
    if why_not(config):
        raise UserError(
            f"model.lora.target_modules={section.target_modules}: the head cannot carry an adapter, "
            "because it never makes logits; name layers of the backbone, or all-linear. To train the head "
            "itself name it in model.lora.modules_to_save"
        )
    try:
        # In the dtype of the model, as DeepSpeed makes them below stage 3. There it keeps what each tensor
        # has, and trains no two dtypes; and DoRA would compare lengths in bf16 with lengths in fp32.
        adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
        if section.takes_from_base:
            take_from_base(adapted, section.init_lora_weights)
    except (ValueError, TypeError) as error:
        options = f"model.lora.target_modules={section.target_modules}, "
        options += f"modules_to_save={section.modules_to_save or []}"
        if section.target_parameters:
            options += f", target_parameters={section.target_parameters}"
        raise UserError(f"{options}: {first_line(error)}") from error
    _check_patterns(adapted, section)
    if keep_copy:
        keep_frozen_copy(adapted)
    activate(adapted, ADAPTER)
    scoring.set_adapted(adapted)


def _peft_config(model: PreTrainedModel, section: LoraSection, images: bool):
    """peft's LoraConfig of the options. Raises UserError for names that the model lacks."""
    from peft import LoraConfig

    whole = section.modules_to_save or []
    _check_whole(model, whole)
    named, excluded, layers = _targets(model, section, images)
    shared = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    tokens = section.trainable_token_indices
    if shared and tokens:
        raise UserError(
            f"model.lora.trainable_token_indices={tokens}: the head of {type(model).__name__} shares the "
            "weight of the embeddings, and makes no logits that changed rows could change; train both "
            "whole with model.lora.modules_to_save=[embed_tokens]"
        )
    ends = {name.split(".")[-1] for name in whole} & {*HEADS, *EMBEDDINGS}
    # Lists of its own: peft (0.21) writes the layer that is tied to the head into the one that it is given.
    return LoraConfig(
        r=section.r,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        target_modules=named.modules if isinstance(named.modules, str) else list(named.modules),
        target_parameters=list(named.parameters) or None,
        exclude_modules=excluded,
        layers_to_transform=list(layers) if isinstance(layers, list) else layers,
        layers_pattern=None if layers is None else section.layers_pattern,
        rank_pattern=named.rank_pattern | section.rank_pattern,
        alpha_pattern=named.alpha_pattern | section.alpha_pattern,
        use_rslora=section.use_rslora,
        use_dora=section.use_dora,
        init_lora_weights=True if section.takes_from_base else section.init_lora_weights,
        bias=section.bias,
        trainable_token_indices=tokens,
        modules_to_save=list(whole) or None,
        ensure_weight_tying=shared and bool(ends),
        task_type="CAUSAL_LM",
    )


def _targets(
    model: PreTrainedModel, section: LoraSection, images: bool
) -> tuple[Targets, list[str] | str | None, int | list[int] | None]:
    """What gets adapters, what does not though it is named, and the layers that names are of.

    Raises:
        UserError: adapters cannot be there, or names are of nothing.
    """
    targets, parameters = section.target_modules, section.target_parameters or []
    check_parameters(model, parameters, section.dropout)
    check_no_router(model, targets)
    check_called(model, targets)
    _check_layers(model, section)
    silent = frozen_beside(model, targets)
    if targets != "all-linear":
        check_named(model, section)
        excluded = _excluded(model, section, silent)
        return Targets(targets, parameters), excluded, section.layers_to_transform
    silent += linear_routers(model) + layers_never_called(model)
    named = all_linear(model, section, silent + without_gradient(model, images))
    more = [each for each in parameters if not _any_ends(named.parameters, each)]
    named = replace(named, parameters=named.parameters + more)
    return named, _excluded(model, section, []), None


def _any_ends(names: Iterable[str], end: str) -> bool:
    return any(f".{name}".endswith(f".{end}") for name in names)


def _excluded(
    model: PreTrainedModel, section: LoraSection, silent: list[str]
) -> list[str] | str | None:
    """What gets no adapters: what is named, and `silent`. Raises UserError for names of no module."""
    named, names = section.exclude_modules, [name for name, _ in model.named_modules()]
    if isinstance(named, str):
        if not any(re.fullmatch(named, name) for name in names):
            raise UserError(
                f"model.lora.exclude_modules={named}: as a regular expression it means no module of the "
                "model by its whole name; to exclude by the end of names give a list"
            )
        return "|".join([f"(?:{named})", *map(re.escape, silent)])
    for each in named or []:
        if not _any_ends(names, each):
            raise UserError(
                f"model.lora.exclude_modules={each}: the model has no such module; leave it out"
            )
    return [*(named or []), *silent] or None


def _check_layers(model: PreTrainedModel, section: LoraSection) -> None:
    """Raises UserError if `layers_to_transform` names a layer that is not there, or goes by no name."""
    layers = section.layers_to_transform
    if layers is None:
        return
    if isinstance(section.target_modules, str) and section.target_modules != "all-linear":
        raise UserError(
            f"model.lora.layers_to_transform={layers} goes with names of modules, and model.lora."
            f"target_modules={section.target_modules} is a regular expression; write the layers into it"
        )
    count = model.config.get_text_config().num_hidden_layers
    wrong = [n for n in ([layers] if isinstance(layers, int) else layers) if not 0 <= n < count]
    if wrong or layers == []:
        raise UserError(
            f"model.lora.layers_to_transform={layers}: the model has layers 0 to {count - 1}; name some "
            "of them, or leave the option out for all"
        )


def _check_patterns(adapted: nn.Module, section: LoraSection) -> None:
    """Raises UserError for a pattern that means no adapter: peft passes it over."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [name for name, each in adapted.named_modules() if isinstance(each, BaseTunerLayer)]
    for option in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(section, option):
            if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in layers):
                known = sorted({name.split(".")[-1] for name in layers})
                raise UserError(
                    f"model.lora.{option}: {pattern} means no module with an adapter; these are "
                    f"{', '.join(known)}"
                )


def _check_whole(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Raises UserError if a name of `modules_to_save` is no module that texts go through."""
    parts = (decoder_of(model), model.get_output_embeddings(), model.get_input_embeddings())
    reached = {id(module) for part in parts for module in part.modules()}
    modules = dict(model.named_modules())
    _check_apart(modules, names)
    # Parts that see images, where they are trained.
    reached |= {id(each) for each in modules.values() if _all_trained(each)}
    for name in names:
        found = [module for key, module in modules.items() if key.endswith(name)]
        if not any(list(module.parameters()) for module in found):
            known = sorted(
                {key.split(".")[-1] for key in modules if key.split(".")[-1].isidentifier()}
            )
            raise UserError(
                f"model.lora.modules_to_save={name}: the model has no such module with weights; it has "
                f"{', '.join(known)}"
            )
        if not all(id(module) in reached for module in found):
            raise UserError(
                f"model.lora.modules_to_save={name}: no text goes through it, so that it would not be "
                "trained; leave it out. What images go through is trained with "
                "model.freeze_vision_tower=false or model.freeze_multi_modal_projector=false"
            )
        held = {key for each in found for key in each.state_dict()}
        parameters = (each.named_parameters(remove_duplicate=False) for each in found)
        if more := held - {key for those in parameters for key, _ in those}:
            kept = ", ".join(sorted(more))
            raise UserError(
                f"model.lora.modules_to_save={name}: such modules hold {kept} beside what "
                "is trained, which has no place in an adapter; name parts of them, or train adapters there"
            )


def _check_apart(modules: Mapping[str, nn.Module], names: Iterable[str]) -> None:
    """Raises UserError if `modules_to_save` means a module inside another: peft cannot save that."""
    ends = tuple(names)
    outer: list[str] = []
    for key in modules if ends else ():  # a module comes before those inside it
        if not key.endswith(ends):
            continue
        if inside := next((each for each in outer if key.startswith(f"{each}.")), None):
            raise UserError(
                f"model.lora.modules_to_save={list(ends)}: names mean every module that ends so, {key} "
                f"inside {inside} too, and such an adapter cannot be saved; give one of the two alone, "
                f"with more of its name, as {inside} or {key}"
            )
        outer.append(key)


def _all_trained(module: nn.Module) -> bool:
    parameters = list(module.parameters())
    return bool(parameters) and all(each.requires_grad for each in parameters)
