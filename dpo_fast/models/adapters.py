"""Adapters (peft) on a model: a trained one that goes on, and which of a model's adapters are on.

Where the policy goes on with a trained adapter, a frozen copy of it may be the reference. So may a copy
that follows it. New adapters are made in `lora.py`.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from dpo_fast.errors import UserError
from dpo_fast.models.checkpoint import HEADS, adapter_file, base_of
from dpo_fast.models.lora_start import TAKEN, TRAINED, cancel_first

ADAPTER = TRAINED  # the name that peft gives the trained adapter
START = "ref"  # a frozen copy of it as it started; TRL's name
# Kinds of adapters that act outside the layers, where the scoring forward does not come by.
ELSEWHERE = {
    "XLORA": "it mixes adapters in a forward of its own",
    "POLY": "it needs a task id with every row",
    "ADAPTION_PROMPT": "it adds tokens to the attention",
    "ADALORA": "its ranks are moved by the trainer of each step",
    "ADAMSS": "its parts are masked by the trainer of each step",
    "LILY": "it weighs its experts by the mean over all tokens of a batch",
    "PVERA": "it draws noise in every forward",
    "SHADOW": "it keeps a state of its own beside the layers",
}
# Options of LoRA with which it does the same.
VARIANTS = {
    "alora_invocation_tokens": "turn it on in the middle of a sequence",
    "monteclora_config": "draws noise in every forward",
    "arrow_config": "chooses among adapters for each token, and cannot be saved with them",
    "layer_replication": "repeats layers of the base model",
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
    for option, what in VARIANTS.items():
        if getattr(config, option, None):
            return f"{option} {what}"
    targets = getattr(config, "target_modules", None) or ()
    named = [targets] if isinstance(targets, str) else targets
    if any(name.split(".")[-1] in HEADS for name in named):
        return "target_modules has the head, which never makes logits that an adapter could change"
    return None


def check_adapter(path: str, option: str) -> Any:
    """The peft configuration of an adapter folder. Raises UserError if it cannot be used."""
    from peft import PeftConfig

    adapter_file(path, option)
    try:
        config = PeftConfig.from_pretrained(path)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(
            f"{option}={path}: peft does not know this adapter: {first_line(error)}"
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
    _check_rows(config, scoring.causal_lm, path, option)
    config.inference_mode = False  # as saved it says that nothing is trained
    start_plainly(config)
    scoring.set_adapted(get_peft_model(scoring.model, config))


def names_under(model: nn.Module) -> tuple[str, ...]:
    """Names of the adapters that are active and frozen under the one that is trained."""
    return getattr(model, "names_under", ())


def load_adapter(scoring: nn.Module, path: str, option: str, keep_start: bool) -> None:
    """Wrap the base model with the adapter of a folder, to train it further. Its dropout is off.

    keep_start: also keep a frozen copy of the adapter.

    Raises:
        UserError: the adapter does not fit the model, or changes more than layers inside it.
    """
    from peft import PeftModel

    config = check_adapter(path, option)
    _check_rows(config, scoring.causal_lm, path, option)
    dropout = without_dropout(config)
    config.inference_mode = False  # as saved it says that nothing is trained
    try:
        # In the dtype of the model, as DeepSpeed makes it: the reference must round as the policy does.
        model = PeftModel.from_pretrained(
            scoring.model, path, config=config, is_trainable=True, autocast_adapter_dtype=False
        )
    except (ValueError, KeyError, TypeError, RuntimeError, OSError) as error:
        base = base_of(path, option)
        raise UserError(
            f"{option}={path}: the adapter does not fit its base model {base}: {first_line(error)}"
        ) from error
    vars(config).update(dropout)  # for the export
    if keep_start:
        keep_frozen_copy(model)
    scoring.set_adapted(model)


def _check_rows(config: Any, model: nn.Module, path: str, option: str) -> None:
    """Raises UserError if an adapter changes rows of embeddings that the head shares."""
    rows = getattr(config, "trainable_token_indices", None)
    if rows and model.get_output_embeddings().weight is model.get_input_embeddings().weight:
        raise UserError(
            f"{option}={path} has trainable_token_indices={rows}: rows of embeddings whose weight the head "
            "shares, and the head makes no logits that they could change. Set model.adapter=merge, with "
            "model.lora for new adapters: the rows are then the base's"
        )


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
    copied_config = copy.deepcopy(config)
    start_plainly(copied_config)
    without_dropout(copied_config)
    model.add_adapter(START, copied_config, autocast_adapter_dtype=False)  # it rounds as the policy
    for _, copied, parameter in copies_of(model, active):
        copied.data.copy_(parameter.data)
        copied.requires_grad_(False)
    cancel_first(model, START)
    activate(model, active)
    return START


def start_plainly(config: Any) -> None:
    """Have an adapter that gets other values begin as LoRA does: some starts change the base."""
    if isinstance(getattr(config, "init_lora_weights", None), str):
        config.init_lora_weights = True


def without_dropout(config: Any) -> dict[str, float]:
    """Turn off what peft's kinds of adapters have for dropout; gives what it was, by its names."""
    found = {name: value for name, value in vars(config).items() if "dropout" in name and value}
    vars(config).update(dict.fromkeys(found, 0.0))
    return found


def copies_of(
    model: nn.Module, adapter: str = ADAPTER
) -> Iterator[tuple[str, nn.Parameter, nn.Parameter]]:
    """Every parameter of the copy of an adapter once: its name, itself, and the one that it is of."""
    known, seen = dict(model.named_parameters(remove_duplicate=False)), set()
    for name, parameter in known.items():
        # An adapter may be called as a module of the model is, `model` for one.
        head, found, tail = f"{name}.".rpartition(f".{adapter}.")
        other = f"{head}.{START}.{tail}".rstrip(".")
        copied = known.get(other) if found else None
        if copied is not None and id(copied) not in seen:
            seen.add(id(copied))
            yield other, copied, parameter


def activate(model: nn.Module, name: str, trained: bool = True) -> None:
    """Have a PeftModel compute with this adapter, and train it or not. Those that stay are on as well."""
    staying = (*((TAKEN,) if TAKEN in model.peft_config else ()), *names_under(model))
    if not staying:
        model.set_adapter(name, inference_mode=not trained)
        return
    model.base_model.set_adapter([name, *staying], inference_mode=not trained)
    _freeze(model, staying)


def only_under(model: nn.Module) -> None:
    model.base_model.set_adapter(list(names_under(model)), inference_mode=True)


@contextlib.contextmanager
def as_started(model: nn.Module) -> Iterator[None]:
    """A context in which a PeftModel computes as its reference: as before its first update, say.

    Its trained adapter is off, and with it all that are not to stay; or, where there is a copy of one that
    is not trained, the copy is on.
    """
    if START not in model.peft_config and not names_under(model):
        try:
            with model.disable_adapter():
                yield
        finally:
            _freeze(model, (TAKEN,))
        return
    active = model.active_adapter
    if START in model.peft_config:
        activate(model, START, trained=False)
    else:
        only_under(model)
    try:
        yield
    finally:
        if active in names_under(model):
            only_under(model)
        else:
            activate(model, active)


def _freeze(model: nn.Module, names: Iterable[str]) -> None:
    """Have adapters not be trained: peft turns on the gradients of each that it activates."""
    parts = [f".{name}." for name in names if name in model.peft_config]
    for key, parameter in model.named_parameters() if parts else ():
        if any(part in f"{key}." for part in parts):
            parameter.requires_grad_(False)


def first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
