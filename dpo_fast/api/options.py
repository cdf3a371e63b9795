"""A run's options as Python gives them: a configuration, keyword arguments, peft's LoraConfig."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Mapping
from functools import cache
from typing import Any

from pydantic import BaseModel

from dpo_fast.errors import UserError
from dpo_fast.training.config import RunConfig
from dpo_fast.training.config_file import SECTIONS, read_tree

HERE = "PreferenceRun"  # what errors begin with
# TRL's names for options that are called otherwise here, or stand in several sections.
OTHER_NAMES = {"loss_type": "loss.type", "loss_weights": "loss.weights", "seed": "train.seed"}
NOT_OF_A_RUN = (
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path"),
    *("revision", "inference_mode", "runtime_config"),
)
# Arguments of TRL's trainers that have no near name here, or whose nearest name is another thing.
NAMED_HERE = {
    "args": "options of TRL's or transformers' are arguments here, such as learning_rate=1e-6",
    "bf16": 'it is dtype="bf16"',
    "fp16": 'dtype="bf16" or "fp32" is there',
    "gradient_accumulation_steps": "global_batch_size has the examples of a step on all ranks together",
    "per_device_train_batch_size": "it is micro_batch_size, beside global_batch_size",
    "eval_strategy": "eval_steps=100 evaluates after so many steps",
    "save_strategy": "save_steps=100 saves after so many steps",
    "rpo_alpha": 'it is loss={"type": ["sigmoid", "sft"], "weights": [1, 0.1]}',
    "compute_metrics": "on_evaluate of a callback sees what is measured",
    "optimizers": "optim names the optimiser",
    "data_collator": "rows are made into batches by the layout",
    "model_init_kwargs": 'they are options of the section model, such as **{"model.dtype": "bf16"}',
    "precompute_ref_log_probs": "they are computed once and kept, by default",
}
# Objects have arguments of their own.
OBJECTS = {
    "train.callbacks": "give it as callbacks=[...]",
    "train.sampler": "give it as sampler=...",
    "model.tokenizer": "give it as processing_class=...",
    "model.path": "give it as the first argument",
    "model.lora": "give it as peft_config=...",
    "data.train": "give it as train_dataset=...",
    "data.eval": "give it as eval_dataset=...",
    "reference.path": "give it as ref_model=...",
    "loss.type": "a function is a loss once @register_loss stands before it, and then has a name",
}
RENAMED = {"lora_alpha": "alpha", "lora_dropout": "dropout"}


def tree_of(config: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """The sections of a run, not yet checked, as YAML would have them.

    config: a RunConfig, the path of a YAML file, or sections as a dict; None for none.
    options: a section with some of its keys, `loss={"beta": 0.2}`; a dotted key, `{"loss.beta": 0.2}`; or
        a key that only one section has, `beta=0.2`. They are stronger than config.

    Raises:
        UserError: something that is no option, or may be several.
    """
    tree = _sections(config)
    for name, value in options.items():
        value = plain(value)
        if name in SECTIONS and isinstance(value, Mapping):
            tree[name] = _section(tree, name) | dict(value)
        elif name in SECTIONS and value is None:
            tree.pop(name, None)
        else:
            _set(tree, (_full_name(name) if "." not in name else name).split("."), value)
    _check_objects(tree)
    return tree


def check_there(tree: Mapping[str, Any]) -> None:
    """Raises UserError where there is no model or nothing to train on, with the argument that takes it."""
    for name in ("model.path", "data.train"):
        section, _, key = name.partition(".")
        if isinstance(tree.get(section), Mapping) and tree[section].get(key) is None:
            raise UserError(f"{HERE}: {name} is missing; {OBJECTS[name]}")


def _check_objects(tree: dict[str, Any]) -> None:
    """Raises UserError for an object in the place of its name, with the argument that takes it."""
    for name, remedy in OBJECTS.items():
        section, _, key = name.partition(".")
        value = tree[section].get(key) if isinstance(tree.get(section), Mapping) else None
        for each in value if isinstance(value, list) else [value]:
            if not isinstance(each, (str, Mapping, bool, int, float, type(None), BaseModel)):
                raise UserError(
                    f"{HERE}: {name} is a {type(each).__name__}, and a configuration holds names: {remedy}"
                )


def _sections(config: Any) -> dict[str, Any]:
    if config is None:
        return {}
    if isinstance(config, RunConfig):
        return config.model_dump(mode="json", exclude_unset=True)
    if isinstance(config, (str, os.PathLike)):
        return read_tree(os.fspath(config))
    if isinstance(config, Mapping):
        return {name: _copied(value) for name, value in config.items()}
    raise UserError(
        f"{HERE}: config is a {type(config).__name__}: expected a RunConfig, the path of a YAML file, or a "
        "dict of sections; options of TRL's or transformers' are keyword arguments here, such as "
        "learning_rate=1e-6"
    )


def _copied(value: Any) -> Any:
    value = plain(value)
    return {key: _copied(each) for key, each in value.items()} if isinstance(value, dict) else value


def plain(value: Any) -> Any:
    """A value as YAML would have it: paths as texts, sections as dicts."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_unset=True)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, (list, tuple)) else value


def _section(tree: dict[str, Any], name: str) -> dict[str, Any]:
    section = tree.get(name)
    if section is not None and not isinstance(section, Mapping):
        raise UserError(f"{HERE}: {name} is not a section but {section!r}")
    return dict(section or {})


def _set(tree: dict[str, Any], names: list[str], value: Any) -> None:
    for name in names[:-1]:
        tree[name] = _section(tree, name)
        tree = tree[name]
    tree[names[-1]] = value


@cache
def _keys() -> dict[str, list[str]]:
    """Full names of options by their last part, of all sections."""
    found: dict[str, list[str]] = {}
    for section, field in RunConfig.model_fields.items():
        for name in getattr(field.annotation, "model_fields", ()):
            found.setdefault(name, []).append(f"{section}.{name}")
    return found


def _full_name(name: str) -> str:
    """`loss.beta` for `beta`. Raises UserError if it is no option, or may be several."""
    known = _keys() | OTHER_NAMES
    found = known.get(name)
    if isinstance(found, str):
        return found
    if found and len(found) == 1:
        return found[0]
    if found:
        section, _, key = found[0].partition(".")
        raise UserError(
            f"{HERE}: {name} may be {' or '.join(found)}; name the section, as in "
            f'{section}={{"{key}": ...}}'
        )
    if name in SECTIONS:
        raise UserError(f'{HERE}: {name} is a section; give its keys, as in {name}={{"...": ...}}')
    if name in NAMED_HERE:
        raise UserError(f"{HERE}: there is no option {name}; {NAMED_HERE[name]}")
    near = difflib.get_close_matches(name, [*known, *SECTIONS], 1)
    hint = f"did you mean {near[0]}?" if near else "docs/CONFIG.md lists all options"
    raise UserError(f"{HERE}: there is no option {name}; {hint}")


def lora_section(peft_config: Any, model_type: str | None) -> dict[str, Any]:
    """peft's LoraConfig as the section `model.lora`.

    model_type: of the base model, for the modules that peft picks where none are named.

    Raises:
        UserError: another method than LoRA, or an option that there is not here.
    """
    from peft import LoraConfig

    from dpo_fast.models.lora_section import LoraSection

    if type(peft_config) is not LoraConfig:
        raise UserError(
            f"{HERE}: peft_config is a {type(peft_config).__name__}: expected peft's LoraConfig"
        )
    defaults, section = LoraConfig(), {}
    for field in dataclasses.fields(LoraConfig):
        value, default = getattr(peft_config, field.name), getattr(defaults, field.name)
        name = RENAMED.get(field.name, field.name)
        if name in LoraSection.model_fields:
            value = sorted(value) if isinstance(value, (set, frozenset)) else value
            if value is not None:
                section[name] = value
        elif field.name not in NOT_OF_A_RUN and value != default:
            raise UserError(
                f"{HERE}: peft_config.{field.name}={value!r} has no counterpart here; leave it out"
            )
    if "target_modules" not in section and not section.get("target_parameters"):
        section["target_modules"] = _modules_of_peft(model_type)
    return section


def _modules_of_peft(model_type: str | None) -> list[str]:
    """The modules that peft puts adapters on where its target_modules is None."""
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as MODULES

    if model_type not in MODULES:
        raise UserError(
            f"{HERE}: peft_config.target_modules=None, and peft has no default for {model_type}; name the "
            'modules, or set "all-linear"'
        )
    return sorted(MODULES[model_type])
