"""transformers' TrainingArguments, which TRL and LLaMA-Factory share, and what they are here."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from dpo_fast.errors import UserError
from dpo_fast.migration.arguments_table import SAME_ADAMW, above_zero
from dpo_fast.migration.counted import put_per_epoch
from dpo_fast.migration.deepspeed import put_deepspeed
from dpo_fast.migration.draft import Draft
from dpo_fast.migration.files import beside, read_mapping
from dpo_fast.migration.launcher import put_fsdp
from dpo_fast.migration.option import flag
from dpo_fast.migration.reporting import put_hub, put_loggers
from dpo_fast.training.optimisers import ALIASES, OPTIMISERS


def finish_training(draft: Draft) -> None:
    """The options of `TRAINING` that are read together."""
    _batches(draft)
    _precision(draft)
    put_optimiser(draft, "optim")
    if draft["lr_scheduler_type"] != "constant":
        warm_up(draft, "warmup_steps")
    keep_all(draft)
    _steps(draft)
    shards(draft)
    put_loggers(draft)
    put_hub(draft)
    if flag(draft["overwrite_output_dir"]):
        draft.put("train.overwrite_output_dir", True, "overwrite_output_dir")
    if flag(draft["save_only_model"]):
        draft.put("train.save_model", True, "save_only_model")


def shards(draft: Draft) -> None:
    """A DeepSpeed configuration that is named or written out, or FSDP."""
    config = draft["deepspeed"]
    if isinstance(config, str) and config.strip().startswith("{"):
        try:
            config = json.loads(config)
        except json.JSONDecodeError as error:
            raise draft.fault("deepspeed", f"not JSON: {error.msg}") from None
    if isinstance(config, str):
        config = _named_file(draft, config, "deepspeed", "DeepSpeed configuration")
    if isinstance(config, dict) and config:
        put_deepspeed(draft, config, "deepspeed")
    if draft["fsdp"] or draft["fsdp_config"]:
        own = draft["fsdp_config"]
        name = "fsdp" if draft["fsdp"] else "fsdp_config"
        if isinstance(own, str):
            own = _named_file(draft, own, "fsdp_config", "FSDP configuration")
        put_fsdp(draft, own or {}, name, draft["fsdp"])
        draft.went("fsdp_config", "parallel.zero_stage")


def _named_file(draft: Draft, name: str, option: str, what: str) -> dict[str, Any]:
    """The file of that name; none where it cannot be read, which is told."""
    try:
        return read_mapping(beside(name, Path(draft.place), what, option))
    except UserError as error:
        told = str(error).removeprefix(f"{draft.place}: {option}={name}: ").partition("; ")[0]
        draft.lose(option, f"{told}. Import where it is, or set parallel.zero_stage")
        return {}


def batches(
    draft: Draft, micro: str, accumulation: str, steps: int | None = None, shared: int = 1
) -> None:
    """The sizes of batches: those of a rank, times the steps that are accumulated, times the ranks.

    steps: those that are accumulated; default: what the option says. shared: ranks that have the same rows.
    """
    own, steps = int(draft[micro]), int(draft[accumulation]) if steps is None else steps
    ranks = max((draft.ranks or shared) // shared, 1)
    whole = own * steps * ranks
    draft.put("train.micro_batch_size", own, micro)
    draft.put(
        "train.global_batch_size",
        whole,
        micro,
        accumulation,
        comment=f"{own} x {steps} steps x {ranks} rank{'s' if ranks > 1 else ''}",
    )
    if draft.ranks is None:
        draft.note(
            "The number of GPUs is not told, and train.global_batch_size is that of one: import with "
            "--nproc N for N."
        )


def _batches(draft: Draft) -> None:
    batches(draft, "per_device_train_batch_size", "gradient_accumulation_steps")


def _precision(draft: Draft) -> None:
    if draft.has("fp16") and flag(draft["fp16"]):
        draft.lose("fp16", "bf16 stands in its place: as fast, and it needs no loss scaling")
        draft.put("model.dtype", "bf16", "fp16", comment="in place of fp16")
    elif draft.has("bf16"):
        precision(draft, "bf16", "bf16" if flag(draft["bf16"]) else "fp32")
    elif draft["bf16"] is False:
        draft.put(
            "model.dtype", "fp32", "bf16", comment=f"{draft.trainer} trains in fp32 by default"
        )


def precision(draft: Draft, name: str, dtype: str) -> None:
    """The dtype of weights and activations."""
    draft.put("model.dtype", dtype, name)


def put_optimiser(draft: Draft, option: str) -> None:
    """An AdamW by the same name, or a word about another optimiser. option: that names it."""
    if not draft.has(option):
        return  # theirs is AdamW as well, and auto is as fast
    name = str(draft[option])
    name = ALIASES.get(name, name)
    if name in OPTIMISERS:
        draft.put("train.optim", name, option)
    elif name in SAME_ADAMW:
        draft.spare(option, "AdamW: auto computes the same")
    else:
        draft.lose(option, f"AdamW stands in its place; train.optim has {', '.join(OPTIMISERS)}")


def warm_up(draft: Draft, name: str, default: float = 0.0) -> None:
    """The warm-up in steps; below 1 they are a share of all.

    default: the share where neither steps nor a share are given.
    """
    if draft.has("warmup_ratio") and not float(draft[name] or 0):
        return  # the table has put it
    steps = float(draft[name] or 0) if draft.has(name) else default
    if steps < 1:
        draft.put("train.warmup_ratio", steps, name)
        return
    draft.put("train.warmup_steps", int(steps), name)
    if draft.keys.pop("train.warmup_ratio", None) and "warmup_ratio" in draft.given:
        draft.spare("warmup_ratio", f"{name} stands in its place, there too")


def keep_all(draft: Draft, name: str = "save_total_limit") -> None:
    """Checkpoints that stay: all, where no number is given."""
    if not draft[name]:
        draft.put("train.save_total_limit", None, name)


def _steps(draft: Draft) -> None:
    every(draft, "logging_strategy", "logging_steps", "log.logging_steps")
    every(draft, "save_strategy", "save_steps", "train.save_steps")
    if draft.has("evaluation_strategy") and not draft.has("eval_strategy"):
        draft.given["eval_strategy"] = draft["evaluation_strategy"]
        draft.spare("evaluation_strategy", "read as eval_strategy")
    if not evaluates(draft):
        return
    steps = draft["eval_steps"] or draft["logging_steps"]
    every(draft, "eval_strategy", "eval_steps", "train.eval_steps", steps)


def evaluates(draft: Draft) -> bool:
    """Whether it is evaluated while training."""
    strategy = (
        draft["eval_strategy"] if draft.has("eval_strategy") else draft["evaluation_strategy"]
    )
    return str(strategy or "no").lower() not in ("no", "false", "none")


def every(draft: Draft, strategy: str, steps: str, key: str, value: Any = None) -> None:
    """Something that is done every so many steps, or at the end of every epoch, or never."""
    how = str(draft[strategy]).lower()
    value = draft[steps] if value is None else value
    if how == "epoch":
        if float(draft["num_train_epochs"]) <= 1 and not above_zero(draft["max_steps"] or -1):
            draft.spare(strategy, "the end of the only epoch is that of the run")
        else:
            put_per_epoch(draft, strategy, key, 1, "once an epoch; here it is at the end alone")
    elif how == "best":
        draft.spare(strategy, "the best checkpoint is kept where one is sought")
    elif how not in ("no", "false") and value is not None:
        fraction(draft, steps, key, value, strategy)


def fraction(draft: Draft, name: str, key: str, value: Any, *beside: str) -> None:
    """A number of steps; below 1 it is a share of all of them."""
    number = float(value)
    if number >= 1:
        draft.put(key, int(number), name, *beside)
        return
    total = above_zero(draft["max_steps"] or -1)
    if total is None:
        epochs = next(n for n in ("num_train_epochs", "num_epochs") if n in draft.options)
        times = 1 / (number * float(draft[epochs]))
        put_per_epoch(draft, name, key, times, "a share of the steps")
    else:
        draft.put(key, max(math.ceil(number * total), 1), name, "max_steps")
