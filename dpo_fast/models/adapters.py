"""Adapters (peft) on a model: new ones, and a trained one that goes on.

Where the policy goes on with a trained adapter, a frozen copy of it may be the reference.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from dpo_fast.errors import UserError
from dpo_fast.models.adapter_targets import (
    check_called,
    check_no_router,
    check_parameters,
    frozen_beside,
    layers_never_called,
    linear_routers,
)
from dpo_fast.models.checkpoint import EMBEDDINGS, HEADS, adapter_file, base_of
from dpo_fast.models.config import LoraSection
from dpo_fast.models.decoder import decoder_of

ADAPTER = "default"  # the name that peft gives the trained adapter
START = "ref"  # a frozen copy of it as it started; TRL's name
# Kinds of adapters that act outside the layers, where the scoring forward does not come by.
ELSEWHERE = {
    "XLORA": "it mixes adapters in a forward of its own",
    "POLY": "it needs a task id with every row",
    "ADAPTION_PROMPT": "it adds tokens to the attention",
    "ADALORA": "its ranks are moved by the trainer of each step",
}


def why_not(config: Any) -> str | None:
    """Why an adapter of this configuration (peft's) cannot be trained or scored with.

    It cannot where the adapter changes more than layers inside the model.
    """
    kind = getattr(config.peft_type, "value", config.peft_type)
    if config.is_prompt_learning:
        return f"peft_type={kind} adds virtual tokens before every sequence"
    if kind in ELSEWHERE:
        return f"peft_type={kind}: {ELSEWHERE[kind]}"
    if getattr(config, "alora_invocation_tokens", None):
        return "alora_invocation_tokens turn it on in the middle of a sequence"
    targets = getattr(config, "target_modules", None) or ()
    named = [targets] if isinstance(targets, str) else targets
    if any(name.split(".")[-1] in HEADS for name in named):
        return "target_modules has the head, which never makes logits that an adapter could change"
    return None


def add_lora(scoring: nn.Module, section: LoraSection) -> None:
    """Wrap the backbone's layers with new adapters and freeze everything else but `modules_to_save`.

    Where embeddings and head share a weight, they share the trained copy of it, too.

    Raises:
        UserError: modules that cannot have them, such as the head, or that are not there.
    """
    from peft import LoraConfig, get_peft_model

    model = scoring.causal_lm
    targets, whole = section.target_modules, section.modules_to_save or []
    _check_whole(model, whole)
    parameters = section.target_parameters or []
    check_parameters(model, parameters, section.dropout)
    check_no_router(model, targets)
    check_called(model, targets)
    everything = targets == "all-linear"
    excluded = linear_routers(model) + layers_never_called(model) if everything else []
    excluded += [name for name in frozen_beside(model, targets) if name not in excluded]
    shared = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    ends = {name.split(".")[-1] for name in whole} & {*HEADS, *EMBEDDINGS}
    # Lists of its own: peft (0.21) writes the layer that is tied to the head into the one that it is given.
    config = LoraConfig(
        r=section.r,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        target_parameters=list(parameters) or None,
        exclude_modules=excluded or None,
        modules_to_save=list(whole) or None,
        ensure_weight_tying=shared and bool(ends),
        task_type="CAUSAL_LM",
    )
    if why_not(config):
        raise UserError(
            f"model.lora.target_modules={targets}: the head cannot carry an adapter, because it "
            "never makes logits; name layers of the backbone, or all-linear. To train the head itself "
            "name it in model.lora.modules_to_save"
        )
    try:
        scoring.set_adapted(get_peft_model(scoring.model, config))
    except (ValueError, TypeError) as error:
        options = f"model.lora.target_modules={targets}, modules_to_save={whole}"
        options += f", target_parameters={parameters}" if parameters else ""
        raise UserError(f"{options}: {_first(error)}") from error


def _check_whole(model: nn.Module, names: list[str]) -> None:
    """Raises UserError if a name of `modules_to_save` is no module that texts go through."""
    parts = (decoder_of(model), model.get_output_embeddings(), model.get_input_embeddings())
    reached = {id(module) for part in parts for module in part.modules()}
    modules = dict(model.named_modules())
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
                "trained; leave it out"
            )


def check_adapter(path: str, option: str) -> Any:
    """The peft configuration of an adapter folder. Raises UserError if it cannot be used."""
    from peft import PeftConfig

    adapter_file(path, option)
    try:
        config = PeftConfig.from_pretrained(path)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(
            f"{option}={path}: peft does not know this adapter: {_first(error)}"
        ) from error
    obstacle = why_not(config)
    if obstacle:
        raise UserError(
            f"{option}={path} cannot be used: {obstacle}. Where peft can merge it, set "
            "model.adapter=merge, or merge it with merge_and_unload and name that folder"
        )
    return config


def add_untrained(scoring: nn.Module, path: str, option: str) -> None:
    """Wrap a model with an adapter like that of a folder, without its weights."""
    from peft import get_peft_model

    config = check_adapter(path, option)
    config.inference_mode = False  # as saved it says that nothing is trained
    scoring.set_adapted(get_peft_model(scoring.model, config))


def load_adapter(scoring: nn.Module, path: str, option: str, keep_start: bool) -> None:
    """Wrap the base model with the adapter of a folder, to train it further. Its dropout is off.

    keep_start: also keep a frozen copy of the adapter.

    Raises:
        UserError: the adapter does not fit the model, or changes more than layers inside it.
    """
    from peft import PeftModel

    check_adapter(path, option)
    try:
        # In the dtype of the model, as DeepSpeed makes it: the reference must round as the policy does.
        model = PeftModel.from_pretrained(
            scoring.model, path, is_trainable=True, autocast_adapter_dtype=False
        )
    except (ValueError, KeyError, TypeError, RuntimeError, OSError) as error:
        base = base_of(path, option)
        raise UserError(
            f"{option}={path}: the adapter does not fit its base model {base}: {_first(error)}"
        ) from error
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and "lora_dropout" in name:
            module.p = 0.0
    if keep_start:
        keep_frozen_copy(model)
    scoring.set_adapted(model)


@torch.no_grad()
def keep_frozen_copy(model: nn.Module) -> str:
    """Add a copy of the active adapter of a PeftModel that is not trained. Returns its name.

    An adapter of that name that is there already is taken for it.

    Raises:
        UserError: the adapter trains the base model's biases, of which there is no copy.
    """
    if START in model.peft_config:
        return START
    active = model.active_adapter
    config = model.peft_config[active]
    if getattr(config, "bias", "none") != "none":
        raise UserError(
            f"the adapter has bias={config.bias}: the biases of the base model are trained with it, so "
            "the model without the adapter is not the one that training starts from; give a reference "
            "model of its own"
        )
    model.add_adapter(START, config)
    known = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in known.items():
        head, found, tail = f"{name}.".rpartition(f".{active}.")
        # An adapter may be called as a module of the model is, `model` for one.
        copied = known.get(f"{head}.{START}.{tail}".rstrip(".")) if found else None
        if copied is not None:
            copied.data.copy_(parameter.data)
            copied.requires_grad_(False)
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and START in name.split("."):
            module.p = 0.0
    model.set_adapter(active)
    return START


@contextlib.contextmanager
def as_started(model: nn.Module) -> Iterator[None]:
    """A context in which a PeftModel computes as before its first update.

    Its adapters are off; or, where there is a frozen copy of one, the copy is on.
    """
    if START not in model.peft_config:
        with model.disable_adapter():
            yield
        return
    active = model.active_adapter
    model.set_adapter(START, inference_mode=True)
    try:
        yield
    finally:
        model.set_adapter(active)


def _first(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
