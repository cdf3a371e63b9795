"""OpenRLHF: the command of `openrlhf.cli.train_dpo`, train_sft or train_kto, or its options as YAML."""

from __future__ import annotations

import re
from typing import Any

from dpo_fast.errors import UserError
from dpo_fast.migration.arguments import precision
from dpo_fast.migration.arguments_table import above_zero
from dpo_fast.migration.draft import Draft
from dpo_fast.migration.losses import put_losses, put_option
from dpo_fast.migration.openrlhf_options import NAMES, TABLES, TEXTS
from dpo_fast.migration.option import flag, listed
from dpo_fast.migration.reporting import put_of_loggers
from dpo_fast.migration.sizes import put_lengths, put_lora, put_quantised

__all__ = ["TABLES", "finish", "method_of", "names_of"]


ROUNDS = (
    "it samples while it trains; here rounds sample between runs (docs/ROUNDS.md), and `dpo-fast import "
    "trl` reads GRPO"
)
REWARDS = "reward models are not trained here; dpo-fast judge scores with one (docs/ROUNDS.md)"
ELSEWHERE = {
    **dict.fromkeys(("ppo", "ppo_ray", "grpo", "grpo_ray", "es_ray", "opd"), ROUNDS),
    **dict.fromkeys(("rm", "prm"), REWARDS),
}
SECTIONS = {name.partition(".")[0] for name in (*NAMES.values(), "muon.lr")}
SIGNS = {  # options that one method alone has, or that none here has
    "dpo": ("ref_pretrain", "chosen_key", "rejected_key", "ipo", "nll_loss_coef"),
    "kto": ("label_key", "desirable_loss_weight", "undesirable_loss_weight"),
    "sft": ("pretrain_mode", "multiturn", "output_key"),
}


def started(start: str, words: list[str]) -> str | None:
    """The method of a command: train_dpo is dpo."""
    found = re.search(r"train_(\w+)", start)
    return found[1] if found else None


def method_of(given: dict, asked: str | None, place: str) -> str:
    """Which of its methods a file is for. Sections of a YAML file are laid open.

    Raises:
        UserError: it has no counterpart.
    """
    for name in SECTIONS & set(given):
        if isinstance(given[name], dict):
            given |= _opened(name, given.pop(name))
    signs = (
        m for m, own in SIGNS.items() if {*own, *(NAMES.get(each) for each in own)} & set(given)
    )
    found = asked or next(signs, "dpo")
    if found not in TABLES:
        why = ELSEWHERE.get(found, "it has no counterpart here")
        raise UserError(
            f"{place} is for OpenRLHF's {found}, and {', '.join(TABLES)} are what is read: {why}"
        )
    others = {
        **dict.fromkeys(("reward_pretrain", "reward.model_name_or_path"), "PPO"),
        **dict.fromkeys(("critic_pretrain", "critic.model_name_or_path"), "PPO"),
        "teacher_model": "distillation",
    }
    for name, what in others.items():
        if name in given:
            raise UserError(
                f"{place}: {name} is of {what}, which has no counterpart here; train_dpo has"
            )
    return found


def _opened(name: str, section: dict) -> dict:
    """A section as options whose names have dots."""
    made: dict = {}
    for key, value in section.items():
        made |= (
            _opened(f"{name}.{key}", value) if isinstance(value, dict) else {f"{name}.{key}": value}
        )
    return made


def names_of(method: str) -> dict[str, str]:
    """The newer names of its options."""
    return {name: newer for name, newer in NAMES.items() if name in TABLES[method]}


def finish(draft: Draft, method: str) -> None:
    """All that is read together with something else."""
    if draft["pretrain"] is None:
        raise draft.missing("model", "pretrain")
    _data(draft)
    {"dpo": _pairs, "sft": _answers, "kto": _labelled}[method](draft)
    _precision(draft)
    _schedule(draft)
    _parallel(draft)
    {"dpo": _dpo, "sft": _sft, "kto": _kto}[method](draft)
    _lora(draft)
    if flag(draft["load_in_4bit"]):
        name = "load_in_4bit"
        put_quantised(draft, 4, (name, "nf4"), (name, True), name)
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
        raise draft.missing("data", "dataset")
    split = draft["train_split"] if draft.has("train_split") else draft["dataset_split"]
    names = ("dataset", "dataset_split", "train_split", "dataset_probs")
    draft.put("data.train", _sources(draft, "dataset", str(split), draft["dataset_probs"]), *names)
    if draft.has("eval_dataset"):
        held = _sources(draft, "eval_dataset", str(draft["eval_split"]), None)
        draft.put("data.eval", held, "eval_dataset", "eval_split")
        if steps := above_zero(draft["eval_steps"]):
            draft.put("train.eval_steps", steps, "eval_steps")
    put_lengths(draft, "max_len", int(draft["max_len"]))
    draft.put("data.truncation", "keep_start", "max_len")
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
        if at and name in ("json", "csv", "parquet", "arrow"):  # of `datasets`: files in a folder
            name, at = f"{folder.rstrip('/')}/", ""
        if at:
            draft.lose(
                f"{option}: {name}@{folder}", "a folder of a data set: name its files in data.train"
            )
        local = name.startswith((".", "/", "~")) or name.endswith(
            (".jsonl", ".json", ".csv", ".parquet", "/")
        )
        paths.append(name if local else f"{name}:{split}")
    if len(weights) > 1:
        return [
            {"path": path, "weight": weight} for path, weight in zip(paths, weights, strict=True)
        ]
    return paths if len(paths) > 1 else paths[0]


def _pairs(draft: Draft) -> None:
    """The columns of pairs."""
    _columns(draft, prompt="prompt_key", chosen="chosen_key", rejected="rejected_key")
    if flag(draft["apply_chat_template"]):
        draft.put("data.apply_chat_template", True, "apply_chat_template")


def _answers(draft: Draft) -> None:
    """The columns of demonstrations: texts, conversations, or prompts with answers."""
    chat, texts = flag(draft["apply_chat_template"]), flag(draft["pretrain_mode"])
    if texts or not chat and not draft.has("output_key"):
        draft.put("data.format", "text", "pretrain_mode" if texts else "input_key")
        _columns(draft, text="input_key")
        for name in ("output_key", "input_template", "apply_chat_template", "multiturn"):
            if name in draft.given:
                draft.spare(name, "rows are texts, which are learnt as they stand")
        if not texts:
            draft.note(
                "Neither output_key nor pretrain_mode is given, and of such rows OpenRLHF learns their "
                "end alone. Here every token of them is scored."
            )
        return
    if chat and not draft.has("output_key"):
        _columns(draft, messages="input_key")
        scored = "assistant" if flag(draft["multiturn"]) else "last"
        draft.put("data.scored", scored, "multiturn")
        draft.went("apply_chat_template", "data.columns")
        _templated(draft, False)
        return
    _columns(draft, prompt="input_key", completion="output_key")
    draft.put("data.apply_chat_template", chat, "apply_chat_template")
    _templated(draft, not chat)


def _labelled(draft: Draft) -> None:
    """The columns of completions with labels."""
    chat = flag(draft["apply_chat_template"])
    if draft.has("output_key"):
        _columns(draft, prompt="input_key", completion="output_key", label="label_key")
        draft.put("data.apply_chat_template", chat, "apply_chat_template")
    else:
        draft.put("data.format", "sharegpt", "input_key", comment="the last message is the answer")
        _columns(draft, messages="input_key", label="label_key")
        draft.went("apply_chat_template", "data.format")
    _templated(draft, draft.has("output_key") and not chat)


def _columns(draft: Draft, **keys: str) -> None:
    """data.columns, of our names and the options that name theirs."""
    columns = {}
    for ours, name in keys.items():
        if draft[name] is not None and draft[name] != ours:
            columns[ours] = str(draft[name])
        elif draft.has(name):
            draft.spare(name, "the column has our name")
    if columns:
        draft.put("data.columns", columns, *keys.values())


def _templated(draft: Draft, used: bool) -> None:
    """What becomes of a template that OpenRLHF writes prompts with, unless it is empty."""
    template = draft["input_template"]
    if used and template and "{}" in str(template):
        draft.lose("input_template", f"prompts are written with it there. {TEXTS}")
    elif "input_template" in draft.given:
        draft.spare("input_template", "the chat template writes prompts, or none is set")


def _precision(draft: Draft) -> None:
    """bf16 since there is param_dtype; before that the flag bf16 said so."""
    if draft.has("param_dtype") or draft.written:
        name = "param_dtype"
        if str(draft[name]) == "fp16":
            draft.lose(name, "bf16 stands in its place: as fast, and it needs no loss scaling")
            draft.put("model.dtype", "bf16", name, comment="in place of fp16")
        else:
            precision(draft, name, "bf16")
        return
    precision(draft, "bf16", "bf16" if flag(draft["bf16"]) else "fp32")


def _schedule(draft: Draft) -> None:
    name = str(draft["lr_scheduler"])
    draft.put("train.lr_scheduler_type", name, "lr_scheduler")
    if name in ("cosine_with_min_lr", "cosine_warmup_with_min_lr"):
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


def _sft(draft: Draft) -> None:
    put_losses(draft, {"sft": 1.0}, comment="train_sft")


def _kto(draft: Draft) -> None:
    put_losses(draft, {"kto": 1.0}, comment="train_kto")
    for ours, theirs in (
        ("beta", "beta"),
        ("desirable_weight", "desirable_loss_weight"),
        ("undesirable_weight", "undesirable_loss_weight"),
    ):
        put_option(draft, ["kto"], ours, float(draft[theirs]), theirs)


def _dpo(draft: Draft) -> None:
    if draft.has("ref_pretrain") and draft["ref_pretrain"] != draft["pretrain"]:
        draft.put("reference.path", draft["ref_pretrain"], "ref_pretrain")
    elif draft.has("ref_pretrain"):
        draft.spare("ref_pretrain", "the reference is the model as it starts")
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
