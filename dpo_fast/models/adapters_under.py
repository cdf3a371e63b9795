"""Adapters that stay active and frozen under the one that is trained: `model.adapters`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from dpo_fast.errors import UserError
from dpo_fast.models.adapters import (
    ADAPTER,
    activate,
    check_adapter,
    first_line,
    names_under,
    only_under,
    start_plainly,
    without_dropout,
)
from dpo_fast.models.checkpoint import adapter_vocabulary


def put_under(
    scoring: nn.Module, adapters: Mapping[str, str], option: str, weights: bool = True
) -> None:
    """Have a model compute with the adapters of these folders as well. They are not trained.

    weights: False for one on the meta device: names and shapes alone.

    Raises:
        UserError: one does not fit the model, or changes more than the layers that it is on.
    """
    from peft import PeftModel, get_peft_model

    for name, path in adapters.items():
        option = f"model.adapters.{name}"
        config = _check_under(name, path, option, scoring.causal_lm)
        without_dropout(config)
        start_plainly(config)
        model, first = scoring.model, not scoring.has_adapter
        options = {"config": config, "autocast_adapter_dtype": False}
        try:
            if first and weights:
                model = PeftModel.from_pretrained(model, path, adapter_name=name, **options)
            elif first:
                model = get_peft_model(
                    model, config, adapter_name=name, autocast_adapter_dtype=False
                )
            elif weights:
                model.load_adapter(path, name, is_trainable=False, **options)
            else:
                model.add_adapter(name, config, autocast_adapter_dtype=False)
        except (ValueError, KeyError, TypeError, RuntimeError, OSError) as error:
            raise UserError(
                f"{option}={path}: the adapter cannot be under the one that is trained: "
                f"{first_line(error)}; merge it into the base (dpo-fast export --merge) and name that"
            ) from error
        _silence(model, name)  # peft reads the folder's configuration again
        if first:
            scoring.set_adapted(model)
        model.names_under = (*names_under(model), name)
    if adapters and ADAPTER in scoring.model.peft_config:
        activate(scoring.model, ADAPTER)
    elif adapters:
        only_under(scoring.model)


def _silence(model: nn.Module, adapter: str) -> None:
    """Turn off the dropout of an adapter that is there: modules of LoRA, numbers of LoHa and LoKr."""
    for key, module in model.named_modules():
        if isinstance(module, nn.Dropout) and key.endswith(f".{adapter}"):
            module.p = 0.0
        for option, values in vars(module).items():
            if option.endswith("dropout") and isinstance(values, dict) and adapter in values:
                values[adapter] = 0.0


def _check_under(name: str, path: str, option: str, model: nn.Module) -> Any:
    config = check_adapter(path, option)
    parts = {part for each, _ in model.named_parameters() for part in each.split(".")}
    if name in parts:
        raise UserError(f"{option}: the model has parts of that name; choose another one")
    whole = [
        f"{key}={getattr(config, key)}"
        for key in ("modules_to_save", "trainable_token_indices", "bias")
        if getattr(config, key, None) not in (None, "none", [], {})
    ]
    start = getattr(config, "init_lora_weights", None)
    if isinstance(start, str) and re.match("pissa|olora|corda|loftq|lora_ga", start.lower()):
        whole.append(f"init_lora_weights={start}, on a base that is not as it came")
    if adapter_vocabulary(path) is not None and not whole:
        whole.append("embeddings of its own")
    if whole:
        raise UserError(
            f"{option}={path} has {whole[0]}: only adapters beside layers can be active under another "
            "one. Merge it into the base (dpo-fast export --merge), and name that as model.path"
        )
    return config
