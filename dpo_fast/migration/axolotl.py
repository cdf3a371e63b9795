"""Axolotl: its YAML, for SFT or with `rl: dpo`, ipo, orpo, simpo, kto, grpo or gdpo."""

from __future__ import annotations

from dpo_fast.errors import UserError
from dpo_fast.migration.arguments import (
    batches,
    fraction,
    keep_all,
    precision,
    put_optimiser,
    shards,
    warm_up,
)
from dpo_fast.migration.arguments_table import above_zero
from dpo_fast.migration.axolotl_data import put_data
from dpo_fast.migration.axolotl_options import GRPO_NAMES, OF_PEFT, TABLES
from dpo_fast.migration.counted import put_per_epoch
from dpo_fast.migration.draft import Draft
from dpo_fast.migration.option import flag, listed
from dpo_fast.migration.reporting import EVERY_SAVE, put_of_loggers
from dpo_fast.migration.sizes import put_lengths, put_lora, put_quantised
from dpo_fast.migration.trl_grpo import as_prompts, finish_grpo
from dpo_fast.migration.trl_options import ATTENTION, PACKS
from dpo_fast.training.log_section import OTHER_NAMES
from dpo_fast.training.schedule import NAMES

__all__ = ["TABLES", "finish", "method_of", "names_of"]
from dpo_fast.migration.axolotl_losses import put_loss

ELSEWHERE = {"ebft": "it has no counterpart here"}
REWARDS = "reward models are not trained here; dpo-fast judge scores with one (docs/ROUNDS.md)"


WARM_UP = 0.03  # of the steps, where nothing is said


# Options that name a project or a run, and the logger that each is of.
PROJECTS = {
    "wandb_project": "wandb",
    "mlflow_experiment_name": "mlflow",
    "comet_project_name": "comet_ml",
    "trackio_project_name": "trackio",
}
RUNS = {
    "wandb_name": "wandb",
    "wandb_run_id": "wandb",
    "mlflow_run_name": "mlflow",
    "trackio_run_name": "trackio",
}


KERNELS = ("LigerPlugin", "CutCrossEntropyPlugin", "KernelsPlugin")  # plugins that change no value
LIGER = ("liger_rope", "liger_rms_norm", "liger_glu_activation", "liger_swiglu")


def method_of(given: dict, asked: str | None, place: str) -> str:
    """`rl` of a file, or sft without it. Its sections trl and vllm are laid open, and nulls left out.

    Raises:
        UserError: it has no counterpart.
    """
    for section in ("trl", "vllm"):
        inner = given.pop(section, None)
        if isinstance(inner, dict):
            given |= {f"{section}.{name}": value for name, value in inner.items()}
    for name in [name for name, value in given.items() if value is None]:
        del given[name]
    if rewards := [n for n in ("reward_model", "process_reward_model") if flag(given.get(n))]:
        raise UserError(f"{place}: {rewards[0]}: {REWARDS}")
    found = asked or given.get("rl") or "sft"
    found = "dpo" if found is True else str(found)
    if found in ELSEWHERE:
        raise UserError(f"{place}: rl={found}: {ELSEWHERE[found]}")
    if found == "gdpo":  # GRPO with another way to add rewards
        given.setdefault("trl.multi_objective_aggregation", "normalize_then_sum")
        found = "grpo"
    if found not in TABLES:
        raise UserError(f"{place}: rl={found}: choose from {', '.join(TABLES)}")
    return found


def names_of(method: str) -> dict[str, str]:
    """The names of GRPO's options, which stand in sections."""
    return GRPO_NAMES if method == "grpo" else {}


def finish(draft: Draft, method: str) -> None:
    """All that is read together with something else."""
    if not draft.has("base_model"):
        raise draft.missing("model", "base_model")
    if not draft.has("datasets") and not (method == "sft" and draft.has("pretraining_dataset")):
        raise draft.missing("data", "datasets")
    if not draft.has("learning_rate"):
        raise draft.missing("learning rate", "learning_rate")
    put_data(draft, method)
    if method == "grpo":
        _no_evaluation(draft)
        as_prompts(draft)
        if draft.has("sequence_len"):
            draft.spare(
                "sequence_len", "of GRPO trl.max_completion_length bounds answers, there too"
            )
    else:
        _lengths(draft, method)
    _batches(draft)
    _model(draft)
    _lora(draft)
    _schedule(draft)
    _steps(draft)
    shards(draft)
    if (degree := _degree(draft)) > 1:
        names = ("context_parallel_size", "sequence_parallel_degree")
        draft.put("parallel.sequence_parallel", degree, *names)
    _logs(draft)
    if method == "grpo":
        finish_grpo(draft, "micro_batch_size", "num_epochs")
        return
    put_loss(draft, method)
    if method in ("dpo", "ipo", "kto"):
        draft.note(
            "The reference is stored once before training (KTO: scored in every step): the same numbers."
        )


def _no_evaluation(draft: Draft) -> None:
    """GRPO's evaluations: rounds have none of that kind."""
    for key in ("data.eval", "data.eval_rows"):
        if draft.keys.pop(key, None) is not None:
            for name in draft.options_of(key):
                draft.lose(name, EVALUATED)


EVALUATED = "held-out prompts are answered and judged by the section generate"


def _lengths(draft: Draft, method: str) -> None:
    """The longest row. Longer ones are left out there, unless the file says otherwise."""
    name = "excess_length_strategy"
    strategy = str(draft[name]).lower()
    if strategy not in TRUNCATION:
        raise draft.fault(name, f"choose from {', '.join(TRUNCATION)}")
    if strategy == "truncate":
        put_lengths(draft, "sequence_len", int(draft["sequence_len"]), "max_prompt_len")
    else:
        draft.put("data.max_length", int(draft["sequence_len"]), "sequence_len")
        if draft.has("max_prompt_len"):
            draft.spare("max_prompt_len", "rows that are too long are left out")
    draft.put("data.truncation", TRUNCATION[strategy], name)
    if method == "sft" and flag(draft["sample_packing"]):
        draft.lose("sample_packing", PACKS)


TRUNCATION = {"drop": "drop", "truncate": "keep_start", "raise": "error"}


def _degree(draft: Draft) -> int:
    """Ranks that share the tokens of a row."""
    return int(draft["context_parallel_size"] or draft["sequence_parallel_degree"] or 1)


def _batches(draft: Draft) -> None:
    """The batch of a rank, which batch_size is as well, times the ranks that have rows of their own."""
    name, steps = "gradient_accumulation_steps", None
    if draft.has("batch_size") and not draft.has(name):
        name = "batch_size"
        steps = max(int(draft[name]) // int(draft["micro_batch_size"]), 1)
    batches(draft, "micro_batch_size", name, steps, _degree(draft))


def _model(draft: Draft) -> None:
    if flag(draft["fp16"]) or flag(draft["float16"]):
        draft.put("model.dtype", "bf16", "fp16", comment="in place of fp16")
        if draft.has("fp16"):
            draft.lose("fp16", "bf16 stands in its place: as fast, and it needs no loss scaling")
    elif flag(draft["bf16"]) and str(draft["bf16"]) not in ("auto", "full"):
        precision(draft, "bf16", "bf16")
    elif draft.has("bfloat16", "float32"):
        precision(draft, "bfloat16", "bf16" if flag(draft["bfloat16"]) else "fp32")
    elif str(draft["bf16"]) == "full":
        precision(draft, "bf16", "bf16")
    elif not flag(draft["bf16"]):
        precision(draft, "bf16", "fp32")
    _checkpointing(draft)
    for name in ("sdp", "eager", "flex"):
        if flag(draft[f"{name}_attention"]):
            found = {"sdp": "sdpa", "eager": "eager", "flex": "flex_attention"}[name]
            draft.put("model.attention", found, f"{name}_attention")
    if draft.has("attn_implementation"):
        if draft["attn_implementation"] in ATTENTION:
            draft.put("model.attention", draft["attn_implementation"], "attn_implementation")
        else:
            draft.lose("attn_implementation", f"auto chooses one of {', '.join(ATTENTION)}")
    if draft.has("flash_attention"):
        draft.spare("flash_attention", "auto takes a varlen kernel where sequences share a row")
    if draft["activation_offloading"] not in (None, False):
        draft.put("model.activation_offloading", True, "activation_offloading")
        if draft["activation_offloading"] == "disk":
            draft.lose("activation_offloading", "what is kept waits in memory, and not on a disk")
    if flag(draft["torch_compile"]) and draft["torch_compile"] != "auto":
        draft.put("model.torch_compile", True, "torch_compile")
    on = [name for name in LIGER if flag(draft[name])]
    if on:
        draft.put("model.use_liger_kernel", True, *on)
    put_optimiser(draft, "optimizer")
    if others := [
        each for each in map(str, listed(draft["plugins"])) if not each.endswith(KERNELS)
    ]:
        draft.lose("plugins", f"{', '.join(others)}: code of your own runs by the Python interface")


def _checkpointing(draft: Draft) -> None:
    value = draft["gradient_checkpointing"]
    if str(value) in ("offload", "offload_disk", "unsloth"):
        draft.put("model.gradient_checkpointing", True, "gradient_checkpointing")
        draft.put(
            "model.activation_offloading", True, "gradient_checkpointing", comment=f"{value} there"
        )
    else:
        draft.put("model.gradient_checkpointing", flag(value), "gradient_checkpointing")


def _lora(draft: Draft) -> None:
    if draft.has("lora_model_dir"):
        draft.put(
            "model.path",
            draft["lora_model_dir"],
            "lora_model_dir",
            comment="an adapter; it names its base",
        )
        draft.spare("base_model", "adapter_config.json of the adapter names its base")
        _quantised(draft)
        return
    kind = draft["adapter"]
    if not kind:
        return
    if kind not in ("lora", "qlora"):
        raise draft.fault("adapter", "choose lora or qlora; others are not there")
    values = {key: (f"lora_{key}", draft[f"lora_{key}"]) for key in ("r", "alpha", "dropout")}
    values |= {
        key: (f"lora_{key}", draft[f"lora_{key}"])
        for key in ("target_parameters", "modules_to_save", "rank_pattern", "alpha_pattern")
    }
    values |= {name: (f"peft_{name}", draft[f"peft_{name}"]) for name in OF_PEFT}
    if flag(draft["lora_target_linear"]):
        put_lora(draft, values, ("lora_target_linear", "all-linear"))
    else:
        put_lora(draft, values, ("lora_target_modules", draft["lora_target_modules"]))
    draft.went("adapter", "model.lora")
    _quantised(draft)


def _quantised(draft: Draft) -> None:
    """QLoRA: 4 bits, or 8, with scales that are quantised as well."""
    for bits in (4, 8):
        name = f"load_in_{bits}bit"
        if flag(draft[name]):
            put_quantised(draft, bits, (name, "nf4"), (name, True), name)


def _schedule(draft: Draft) -> None:
    if steps := above_zero(draft["max_steps"] or -1):
        draft.put("train.max_steps", steps, "max_steps")
    name = str(draft["lr_scheduler"])
    if name not in NAMES:
        draft.lose("lr_scheduler", "cosine stands in its place; transformers' schedules are there")
        name = "cosine"
    if draft.has("cosine_min_lr_ratio"):
        name = "cosine_with_min_lr"
        least = {"min_lr_rate": float(draft["cosine_min_lr_ratio"])}
        draft.put("train.lr_scheduler_kwargs", least, "cosine_min_lr_ratio")
    draft.put("train.lr_scheduler_type", name, "lr_scheduler")
    if name != "constant":
        warm_up(draft, "warmup_steps", WARM_UP)
        if not draft.has("warmup_steps", "warmup_ratio"):
            draft.note(
                "Where nothing is said of a warm-up, Axolotl takes 3 % of the steps, and 100 of them at "
                "most: for a run of more than 3,333 steps set train.warmup_steps=100."
            )
    keep_all(draft)


def _steps(draft: Draft) -> None:
    for name, key in (("save_steps", "train.save_steps"), ("logging_steps", "log.logging_steps")):
        if draft.has(name):
            fraction(draft, name, key, draft[name])
    if draft.has("eval_steps"):
        if "data.eval" in draft.keys or "data.eval_rows" in draft.keys:
            fraction(draft, "eval_steps", "train.eval_steps", draft["eval_steps"])
        else:
            draft.lose(
                "eval_steps",
                "there is nothing to evaluate on: set data.eval or data.eval_rows, then it",
            )
    evaluated = "data.eval" in draft.keys or "data.eval_rows" in draft.keys
    per_epoch = {"evals_per_epoch": "train.eval_steps", "saves_per_epoch": "train.save_steps"}
    for name, key in per_epoch.items():
        times = float(draft[name] or 0)
        if draft.has(name) and (not times or name == "evals_per_epoch" and not evaluated):
            draft.spare(name, "none" if not times else "there is nothing to evaluate on")
        elif draft.has(name):
            put_per_epoch(draft, name, key, times, "so many times an epoch")
    for name, key in (
        ("eval_strategy", "train.eval_steps"),
        ("evaluation_strategy", "train.eval_steps"),
        ("save_strategy", "train.save_steps"),
    ):
        if name != "save_strategy" and not evaluated:
            continue
        if str(draft[name]) == "epoch" and float(draft["num_epochs"]) > 1:
            put_per_epoch(draft, name, key, 1, "once an epoch; here it is at the end alone")
    if flag(draft["save_only_model"]):
        draft.put("train.save_model", True, "save_only_model")
    if draft.has("early_stopping_patience"):
        if "train.eval_steps" in draft.keys:
            draft.put(
                "train.early_stopping_patience",
                int(draft["early_stopping_patience"]),
                "early_stopping_patience",
            )
        else:
            draft.lose("early_stopping_patience", "it needs train.eval_steps: set both")
    if draft.has("resume_from_checkpoint"):
        draft.put(
            "train.resume_from_checkpoint",
            str(draft["resume_from_checkpoint"]),
            "resume_from_checkpoint",
        )
    elif flag(draft["auto_resume_from_checkpoints"]):
        draft.put("train.resume_from_checkpoint", True, "auto_resume_from_checkpoints")


def _logs(draft: Draft) -> None:
    """The loggers that are on, their projects and runs; and the hub, where hub_model_id turns it on."""
    on = {"wandb": "wandb_project" if draft.has("wandb_project") else "use_wandb"}
    on |= {name: f"use_{name}" for name in ("tensorboard", "mlflow", "comet", "trackio")}
    used = {
        OTHER_NAMES.get(name, name): option
        for name, option in on.items()
        if option == "wandb_project" or flag(draft[option])
    }
    if used:
        draft.put("log.report_to", list(used), *used.values())
    put_of_loggers(draft, "log.project", PROJECTS)
    put_of_loggers(draft, "log.run_name", RUNS)
    if not draft.has("hub_model_id"):
        for name in ("hub_strategy", "hub_revision"):
            if draft.has(name):
                draft.spare(name, "hub_model_id is not set")
        return
    draft.put("train.push_to_hub", True, "hub_model_id")
    draft.put("train.hub_model_id", str(draft["hub_model_id"]), "hub_model_id")
    draft.put("train.hub_private_repo", True, "hub_model_id", comment="as there")
    draft.put("train.hub_strategy", str(draft["hub_strategy"] or EVERY_SAVE), "hub_strategy")
    if draft.has("hub_revision"):
        draft.put("train.hub_revision", str(draft["hub_revision"]), "hub_revision")
