"""OpenRLHF: the command line of `openrlhf.cli.train_dpo`, in a script or by itself, or its "
"options as YAML."""

from __future__ import annotations

import re
from typing import Any

from dpo_fast.errors import UserError
from dpo_fast.migration.arguments import precision
from dpo_fast.migration.arguments_table import above_zero
from dpo_fast.migration.draft import Draft
from dpo_fast.migration.losses import put_losses, put_option
from dpo_fast.migration.openrlhf_options import TABLES
from dpo_fast.migration.option import flag, listed
from dpo_fast.migration.reporting import put_of_loggers
from dpo_fast.migration.sizes import put_lengths, put_lora, put_quantised

__all__ = ["TABLES", "finish", "method_of"]


ELSEWHERE = {
    "sft": "for SFT begin with `dpo-fast init --recipe sft`",
    "kto": "begin with `dpo-fast init`, and set loss.type=kto",
    "rm": "reward models are not trained here; dpo-fast judge scores with one (docs/ROUNDS.md)",
}


def started(start: str, words: list[str]) -> str | None:
    """The method of a command: train_dpo is dpo."""
    found = re.search(r"train_(\w+)", start)
    return found[1] if found else None


def method_of(given: dict, asked: str | None, place: str) -> str:
    """The one that is read. Raises UserError for others."""
    if asked not in (None, "dpo"):
        why = ELSEWHERE.get(asked, "it has no counterpart here")
        raise UserError(f"{place} is for OpenRLHF's {asked}, and train_dpo is what is read: {why}")
    others = {"reward_pretrain": "PPO", "critic_pretrain": "PPO", "teacher_model": "distillation"}
    for name, what in others.items():
        if name in given:
            raise UserError(
                f"{place}: {name} is of {what}, which has no counterpart here; train_dpo has"
            )
    return "dpo"


def finish(draft: Draft, method: str) -> None:
    """All that is read together with something else."""
    if not draft.has("pretrain"):
        raise UserError(f"{draft.place} names no model: add --pretrain")
    _data(draft)
    precision(draft, "bf16", "bf16" if flag(draft["bf16"]) else "fp32")
    _schedule(draft)
    _parallel(draft)
    _loss(draft)
    _lora(draft)
    if flag(draft["load_in_4bit"]):
        name = "load_in_4bit"
        put_quantised(draft, 4, (name, "nf4"), (name, True), name)
    if draft.has("ref_pretrain") and draft["ref_pretrain"] != draft["pretrain"]:
        draft.put("reference.path", draft["ref_pretrain"], "ref_pretrain")
    elif draft.has("ref_pretrain"):
        draft.spare("ref_pretrain", "the reference is the model as it starts")
    loggers = ["wandb"] if draft.has("use_wandb") else []
    loggers += ["tensorboard"] if draft.has("use_tensorboard") else []
    names = [name for name in ("use_wandb", "use_tensorboard") if draft.has(name)]
    if loggers:
        draft.put("log.report_to", loggers, *names)
    if draft.has("use_wandb"):
        draft.note("use_wandb holds a key of W&B. It is not written here: set WANDB_API_KEY.")
        draft.put("log.project", str(draft["wandb_project"]), "wandb_project")
    else:
        put_of_loggers(draft, "log.project", {"wandb_project": "wandb"})
    put_of_loggers(draft, "log.group", {"wandb_group": "wandb"})


def _data(draft: Draft) -> None:
    if not draft.has("dataset"):
        raise UserError(f"{draft.place} names no data: add --dataset")
    split = draft["train_split"] if draft.has("train_split") else draft["dataset_split"]
    names = ("dataset", "dataset_split", "train_split", "dataset_probs")
    draft.put("data.train", _sources(draft, "dataset", str(split), draft["dataset_probs"]), *names)
    if draft.has("eval_dataset"):
        held = _sources(draft, "eval_dataset", str(draft["eval_split"]), None)
        draft.put("data.eval", held, "eval_dataset", "eval_split")
        if steps := above_zero(draft["eval_steps"]):
            draft.put("train.eval_steps", steps, "eval_steps")
    _columns(draft)
    put_lengths(draft, "max_len", int(draft["max_len"]))
    draft.put("data.truncation", "keep_start", "max_len")
    if flag(draft["apply_chat_template"]):
        draft.put("data.apply_chat_template", True, "apply_chat_template")
    most = int(float(draft["max_samples"]))
    if draft.has("max_samples") and "," not in str(draft["dataset"]):
        draft.put("data.max_rows", most, "max_samples")
    elif draft.has("max_samples"):
        draft.lose("max_samples", "of several sources: set `rows` in each (data.train[].rows)")


def _sources(draft: Draft, option: str, split: str, shares: Any) -> Any:
    """Names with commas between them; a hub id has its split, and `name@folder` a folder of it."""
    names = [str(each) for each in listed(draft[option])]
    weights = [float(each) for each in listed(shares)]
    if weights and len(weights) != len(names):
        raise draft.fault("dataset_probs", f"{len(names)} sources need as many")
    paths = []
    for name in names:
        name, at, folder = name.partition("@")
        if at:
            draft.lose(
                f"{option}: {name}@{folder}", "a folder of a data set: name its files in data.train"
            )
        local = name.startswith((".", "/", "~")) or name.endswith(
            (".jsonl", ".json", ".csv", ".parquet")
        )
        paths.append(name if local else f"{name}:{split}")
    if len(weights) > 1:
        return [
            {"path": path, "weight": weight} for path, weight in zip(paths, weights, strict=True)
        ]
    return paths if len(paths) > 1 else paths[0]


def _columns(draft: Draft) -> None:
    columns = {}
    for ours, name in (
        ("prompt", "prompt_key"),
        ("chosen", "chosen_key"),
        ("rejected", "rejected_key"),
    ):
        if draft.has(name) and draft[name] != ours:
            columns[ours] = str(draft[name])
        elif draft.has(name):
            draft.spare(name, "the column has our name")
    if columns:
        draft.put("data.columns", columns, "prompt_key", "chosen_key", "rejected_key")


def _schedule(draft: Draft) -> None:
    name = str(draft["lr_scheduler"])
    draft.put("train.lr_scheduler_type", name, "lr_scheduler")
    if name == "cosine_with_min_lr":
        draft.put(
            "train.lr_scheduler_kwargs",
            {"min_lr_rate": float(draft["min_lr_ratio"])},
            "min_lr_ratio",
        )
    elif draft.has("min_lr_ratio"):
        draft.lose("min_lr_ratio", f"{name} has no least rate; cosine_with_min_lr has")
    betas = listed(draft["adam_betas"])
    if len(betas) != 2:
        raise draft.fault("adam_betas", "expected two numbers")
    for key, value in zip(("adam_beta1", "adam_beta2"), betas, strict=True):
        draft.put(f"train.{key}", float(value), "adam_betas")


def _parallel(draft: Draft) -> None:
    if int(draft["zpg"]) > 1:
        draft.put("parallel.zero_hpz_partition_size", int(draft["zpg"]), "zpg")
    if flag(draft["adam_offload"]):
        draft.put("parallel.offload_optimizer", "cpu", "adam_offload")
    if int(draft["ring_attn_size"]) > 1:
        draft.put("parallel.sequence_parallel", int(draft["ring_attn_size"]), "ring_attn_size")
    coefficient = float(draft["aux_loss_coef"])
    if coefficient:
        draft.put("model.router_aux_loss_coef", coefficient, "aux_loss_coef")


def _loss(draft: Draft) -> None:
    name = "ipo" if flag(draft["ipo"]) else "sigmoid"
    shares, names = {name: 1.0}, ["ipo"]
    if weight := float(draft["nll_loss_coef"]):
        shares["sft"] = weight
        names.append("nll_loss_coef")
        draft.note(
            "nll_loss_coef: OpenRLHF's term is a mean over the rows of their means over "
            "tokens; here it is one "
            "mean over the tokens of the global batch."
        )
    put_losses(draft, shares, *names)
    if name == "ipo":
        draft.put("loss.length_average", False, "ipo")
    put_option(draft, [name], "beta", float(draft["beta"]), "beta")
    smoothing = float(draft["label_smoothing"])
    put_option(draft, [name], "label_smoothing", smoothing, "label_smoothing")


def _lora(draft: Draft) -> None:
    if int(draft["lora_rank"]) < 1:
        for name in ("lora_alpha", "lora_dropout", "target_modules"):
            if name in draft.given:
                draft.spare(name, "lora_rank is not set: the whole model is trained")
        return
    values = {
        "r": ("lora_rank", int(draft["lora_rank"])),
        "alpha": ("lora_alpha", int(draft["lora_alpha"])),
        "dropout": ("lora_dropout", float(draft["lora_dropout"])),
    }
    put_lora(draft, values, ("target_modules", draft["target_modules"]))
