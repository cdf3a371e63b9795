"""From the words of `dpo-fast evaluate` to a configuration: a checkpoint's, a run's, or defaults."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dpo_fast.data.config import DataConfig
from dpo_fast.data.kinds import COMPLETIONS, DEMONSTRATIONS, GROUPS, PAIRS, Kind
from dpo_fast.data.parts import parts_of
from dpo_fast.data.rows import parse_row
from dpo_fast.data.verdicts import BadRows, Verdict
from dpo_fast.durable import existing
from dpo_fast.errors import UserError
from dpo_fast.losses.custom import spec_of
from dpo_fast.models.adapter_path import GIVEN, path_of
from dpo_fast.models.checkpoint import base_of, is_adapter, trains_biases
from dpo_fast.references.table import DEFAULT, PROVIDERS
from dpo_fast.training import distributed
from dpo_fast.training.checkpoint_run import checkpoint_of
from dpo_fast.training.config import RunConfig, build_config
from dpo_fast.training.config_file import apply
from dpo_fast.training.console import say
from dpo_fast.training.data_ranks import shared_or_whole
from dpo_fast.training.earlier_run import MODEL
from dpo_fast.training.overrides import check_used
from dpo_fast.training.places import check_places
from dpo_fast.training.recorded import CONFIG, RUN_CONFIG, read_recorded

# What an evaluation takes of a run's sections. The rest is about training, or about other data.
TRAIN = (
    *("output_dir", "global_batch_size", "micro_batch_size", "tokens_per_batch", "layout", "seed"),
    *("group_prompts", "implementation", "workspace_bytes", "max_steps"),
)
# Options that change an evaluation. Those of `data` that concern training alone are not among them, and
# DATA stands for some: `_check_overrides`.
OF_EVALUATION = (
    *("model.path", "model.revision", "model.tokenizer", "model.dtype", "model.attention"),
    *(
        "model.adapter_path",
        "model.adapters",
        "model.tiled_mlp",
        "model.use_liger_kernel",
        "model.torch_compile",
        "model.fp8",
        "model.trust_remote_code",
    ),
    *("data", "loss", "reference"),
    *("train.output_dir", "train.micro_batch_size", "train.tokens_per_batch", "train.layout"),
    *("train.implementation", "train.workspace_bytes", "train.seed"),
    *("parallel.zero_stage", "parallel.offload_parameters", "parallel.sequence_parallel"),
    *("parallel.timeout_minutes", "parallel.deepspeed", "log.token_metrics"),
)
OF_TRAINING = (
    *("data.streaming", "data.stream_buffer", "data.stopping_strategy"),
    *("reference.sync_steps", "reference.mixup_alpha"),
)
OTHER_DATA = ("eval", "eval_rows", "streaming", "stream_buffer", "stopping_strategy", "max_rows")
FOLDER = "evaluation"  # of what a reference stores, where there is no run
WITHOUT = "simpo"  # the loss where no reference is named: the mean log-prob of each answer
WITH = {PAIRS: "sigmoid", COMPLETIONS: "kto", GROUPS: "plackett_luce"}  # where one is, by rows


@dataclass(frozen=True)
class Evaluation:
    """What is evaluated.

    checkpoint: holds the trained weights; None where model.path does.
    dtype: that the weights are to have; None: each its own, as it was in the run.
    began: the model that the run began with, as it was given, where that is the reference.
    """

    config: RunConfig
    checkpoint: Path | None
    dtype: torch.dtype | None = None
    began: str | None = None


def evaluation_of(
    model: str,
    data: str | list | None,
    reference: str | None = None,
    config: str | None = None,
    overrides: Sequence[str] = (),
    world_size: int | None = None,
) -> Evaluation:
    """What the words of the command mean.

    model: a folder, a hub id, a checkpoint, or the folder of a run: its newest checkpoint.
    data: what data.train takes; None for a run's own evaluation data.
    reference: a model to compare with in place of the run's.
    config: the YAML file of a run, whose data section, loss and reference are used.

    Raises:
        UserError: something does not go together, or is not named.
    """
    checkpoint, began = None if config else checkpoint_of(model), None
    file = _configuration(model, checkpoint, config)
    world = distributed.world_size() if world_size is None else world_size
    if file is None:
        tree = _defaults(model, world)
    else:
        tree = _without_training(read_recorded(file), world)
        if checkpoint is None:
            began = _put_policy(tree, model)
    if data is not None:
        kept = {k: v for k, v in tree["data"].items() if k not in OTHER_DATA}
        tree["data"] = kept | {"train": data}
        _store_nothing_there(tree)
    elif file is None:
        raise UserError(f"what is {model} to be evaluated on? Name a file, a folder or a hub id")
    if reference is not None:
        tree["reference"], began = {"provider": "frozen", "path": reference}, None
    elif file is None and not _named(overrides, "reference."):
        _default_reference(tree, model)
    for override in overrides:
        apply(tree, override)
    if file is None and not _named(overrides, "loss"):
        compares = reference is not None or _named(overrides, "reference.")
        _default_loss(tree, str(data), compares)
    built = build_config(tree, str(file or "dpo-fast evaluate"))
    _check_overrides(overrides, checkpoint, data)
    if data is not None:
        built = built.model_copy(update={"data": built.data.for_evaluation()})
    if not built.data.has_eval:
        raise UserError(f"{file} has no evaluation data: name some behind {model}")
    check_places(built)
    _check_reference(built, checkpoint, reference is not None or file is not None)
    dtype = built.model.torch_dtype if _named(overrides, "model.dtype=") else None
    began = None if _named(overrides, "reference.path=") else began
    return Evaluation(built, checkpoint, dtype, began)


def _check_overrides(overrides: Sequence[str], checkpoint: Path | None, data: str | None) -> None:
    """Raises UserError for an option that the evaluation would not honour."""
    whole = () if checkpoint else ("model.adapter",)
    check_used(overrides, (*OF_EVALUATION, *whole), "an evaluation")
    for override in overrides:
        name = override.partition("=")[0]
        if name in OF_TRAINING:
            raise UserError(f"{name} changes nothing of an evaluation: leave it out")
        if data is not None and name in ("data.train", "data.eval", "data.eval_rows"):
            raise UserError(
                f"{override!r} and DATA={data} both say what is evaluated: leave one of them out"
            )


def _configuration(model: str, checkpoint: Path | None, config: str | None) -> Path | None:
    """The file that says how the model was trained: the one named, or what lies beside the model."""
    if config is not None:
        return Path(config)
    if checkpoint is not None:
        return checkpoint / CONFIG
    folder = Path(os.path.expanduser(model)).resolve()
    beside = folder.parent / RUN_CONFIG
    return beside if folder.name == MODEL and beside.is_file() else None


def _without_training(tree: dict[str, Any], world_size: int) -> dict[str, Any]:
    """A run's tree with what an evaluation needs of it on so many ranks."""
    train = {name: value for name, value in tree.get("train", {}).items() if name in TRAIN}
    log = {k: v for k, v in tree.get("log", {}).items() if k == "token_metrics"}
    kept = {name: tree[name] for name in ("model", "loss", "reference", "parallel") if name in tree}
    kept["parallel"] = shared_or_whole(kept.get("parallel"), world_size)
    return kept | {"data": dict(tree.get("data", {})), "train": train, "log": log}


def _put_policy(tree: dict[str, Any], model: str) -> str | None:
    """Another policy for that of a run, which is compared with what the run was compared with.

    Gives the model that the run began with, as it was given, if that is the reference now.
    """
    section, reference = tree.get("model", {}), dict(tree.get("reference") or {})
    began = path_of(section)
    tree["model"] = section | dict.fromkeys((*GIVEN, "lora", "adapter")) | {"path": model}
    if not is_adapter(model):
        tree["model"]["quantization"] = None  # the base of adapters is quantised, and this is none
    spec = PROVIDERS.get(reference.get("provider"), PROVIDERS[DEFAULT])
    if spec.follows:
        raise UserError(
            f"reference.provider={spec.name} follows the policy, so that the checkpoint alone has it: "
            "evaluate the checkpoint, or name a model with --reference"
        )
    if spec.needs_adapters:
        reference["provider"] = "frozen"
    itself = (spec.needs_adapters or "path" in spec.options) and reference.get("path") is None
    if itself:
        reference["path"] = began
    named = (tree.get("loss") or {}).get("type", [])
    specs = [spec_of(name) for name in ([named] if isinstance(named, str) else named)]
    if any(spec.by_token for spec in specs if spec) and reference.get("old_path") is None:
        reference["old_path"] = began  # it wrote the completions
    tree["reference"] = reference
    return (section.get("adapter_path") or section.get("path")) if itself else None


def _store_nothing_there(tree: dict[str, Any]) -> None:
    """Score the reference beside the policy if it cannot be stored, as in the run of somebody else."""
    reference = tree.get("reference") or {}
    folder = reference.get("cache_dir") or tree["train"].get("output_dir", FOLDER)
    spec = PROVIDERS.get(reference.get("provider"))
    if spec and spec.stores and not os.access(existing(Path(folder)), os.W_OK):
        tree["reference"] = reference | {"provider": "frozen", "cache_dir": None}


def _defaults(model: str, world_size: int) -> dict[str, Any]:
    parallel = {"zero_stage": 0} if world_size == 1 else {}
    train = {"output_dir": FOLDER}
    return {"model": {"path": model}, "data": {}, "train": train, "parallel": parallel}


def _default_reference(tree: dict[str, Any], model: str) -> None:
    """Of an adapter its base model; of a whole model none."""
    if is_adapter(model):
        base = {"provider": "frozen", "path": base_of(model)}
        tree["reference"] = base if trains_biases(model) else {"provider": "adapter_off"}


def _default_loss(tree: dict[str, Any], data: str, compares: bool) -> None:
    """The loss that goes with the rows and with what they are compared with. Raises UserError.

    compares: whether the words name a reference.
    """
    kind = _kind(build_config(tree, "dpo-fast evaluate").data)
    if kind == DEMONSTRATIONS:
        if compares:
            raise UserError(
                f"{data} holds answers to learn, of which none is preferred: a reference tells nothing "
                "about them. Leave --reference out, or name data with pairs, labels or scores"
            )
        say("answers to learn: loss.type=sft, minus the mean log-prob of their tokens")
        tree["loss"] = {"type": "sft"}
        tree.pop("reference", None)
        return
    if tree.get("reference"):
        tree["loss"] = {"type": WITH[kind]}
        return
    if kind == COMPLETIONS:
        raise UserError(
            f"{data} holds completions, each good or bad by itself: such answers are judged against a "
            f"model. Name it with --reference MODEL (loss.type={WITH[kind]})"
        )
    tree["loss"] = {"type": WITHOUT}
    if kind == GROUPS:
        tree["data"].setdefault("group_pairs", "best_worst")
    pairs = "the best and the worst answer of each row are compared" if kind == GROUPS else ""
    say(
        f"no reference is named: {pairs or 'answers are compared'} by their mean log-probability "
        f"(loss.type={WITHOUT}). --reference MODEL compares with a model, by loss.type={WITH[kind]}"
    )


def _kind(data: DataConfig) -> Kind:
    """What the first row holds that can be read. Other mistakes are told when all are read."""
    bad = BadRows("skip", data.row_bytes)
    with contextlib.suppress(UserError):
        for part in parts_of(data.for_evaluation(), "eval"):
            for where, raw in part.read(bad):
                with contextlib.suppress(Verdict):
                    return parse_row(where, raw, part.config).kind
    return PAIRS


def _named(overrides: Sequence[str], start: str) -> bool:
    return any(override.startswith(start) for override in overrides)


def _check_reference(config: RunConfig, checkpoint: Path | None, named: bool) -> None:
    """Raises UserError if the reference would be the evaluated model itself."""
    spec, own = config.reference_spec, config.reference.path is None
    itself = spec.scores and own and not spec.needs_adapters
    if config.loss.objective.needs_reference and checkpoint is None and itself and not named:
        raise UserError(
            f"loss.type={', '.join(config.loss.names)} compares with a reference: name a model with "
            "--reference, or take a loss without one, such as loss.type=simpo or loss.type=sft"
        )
