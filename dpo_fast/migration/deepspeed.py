"""DeepSpeed's JSON, which stands beside the files of other trainers."""

from __future__ import annotations

from typing import Any

from dpo_fast.migration.draft import Draft

AUTO = "auto"
# Sizes of ZeRO that may be tuned, and are DeepSpeed's own matter: they go through as they are.
TUNED = (
    *("reduce_bucket_size", "allgather_bucket_size", "sub_group_size", "reduce_scatter"),
    *("stage3_prefetch_bucket_size", "stage3_param_persistence_threshold", "round_robin_gradients"),
    *("stage3_max_live_parameters", "stage3_max_reuse_distance", "allgather_partitions"),
    *("zero_hpz_partition_size", "zero_quantized_weights", "zero_quantized_gradients"),
)
PLUS_PLUS = ("zero_hpz_partition_size", "zero_quantized_weights", "zero_quantized_gradients")
# What follows from our other sections, or changes no value.
DERIVED = (
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"),
    *(
        "gradient_clipping",
        "steps_per_print",
        "wall_clock_breakdown",
        "zero_allow_untested_optimizer",
    ),
    *("zero_force_ds_cpu_optimizer", "zero3_init_flag", "prescale_gradients"),
)
OF_ZERO = (
    *("stage3_gather_16bit_weights_on_model_save", "overlap_comm", "contiguous_gradients"),
    "ignore_unused_parameters",
)


def put_deepspeed(draft: Draft, config: dict[str, Any], name: str) -> None:
    """A DeepSpeed configuration as our section parallel.

    name: of the option that names it.
    """
    zero = dict(config.get("zero_optimization") or {})
    stage = zero.pop("stage", None)
    if stage not in (None, AUTO):
        draft.put("parallel.zero_stage", int(stage), name)
    for theirs, ours in (
        ("offload_optimizer", "offload_optimizer"),
        ("offload_param", "offload_parameters"),
    ):
        _offload(draft, dict(zero.pop(theirs, None) or {}), f"parallel.{ours}", name)
    rest = {_whole(key): value for key, value in zero.items() if value != AUTO}
    for key in PLUS_PLUS:
        if key in rest:
            draft.put(f"parallel.{key}", rest.pop(key), name)
    tuned = {key: rest.pop(key) for key in TUNED if key in rest}
    if tuned:
        draft.put("parallel.deepspeed", {"zero_optimization": tuned}, name)
    for key in sorted(set(rest) - set(OF_ZERO)):
        draft.lose(
            f"{name}: zero_optimization.{key}", "write it to parallel.deepspeed if you need it"
        )
    _others(draft, config, name)


def _whole(key: str) -> str:
    """A key of ZeRO 3 by its whole name: DeepSpeed takes those without stage3_ as well."""
    return f"stage3_{key}" if f"stage3_{key}" in (*TUNED, *OF_ZERO) else key


def _others(draft: Draft, config: dict[str, Any], name: str) -> None:
    for key, value in config.items():
        if key in ("zero_optimization", *DERIVED) or value == AUTO:
            continue
        enabled = value.get("enabled") if isinstance(value, dict) else value
        if key in ("bf16", "fp16", "bfloat16", "amp"):
            if key in ("fp16", "amp") and enabled is True:
                draft.lose(f"{name}: {key}", "bf16 stands in its place")
        elif key in ("optimizer", "scheduler"):
            _optimizer(draft, key, value, name)
        elif enabled not in (False, None):
            draft.lose(f"{name}: {key}", "write it to parallel.deepspeed if you need it")


def _optimizer(draft: Draft, key: str, value: Any, name: str) -> None:
    kind = str(value.get("type", "")) if isinstance(value, dict) else ""
    if kind.lower() in ("adamw", "adam", "warmupdecaylr"):
        draft.spare(
            f"{name}: {key}", "the options of the optimiser and its schedule decide, as `auto` does"
        )
        fixed = {n: v for n, v in dict(value.get("params") or {}).items() if v != AUTO}
        if fixed:
            draft.lose(f"{name}: {key}.params", f"{fixed}: set them in the section train")
    else:
        draft.lose(
            f"{name}: {key}", "AdamW, with a schedule of transformers (train.lr_scheduler_type)"
        )


def _offload(draft: Draft, section: dict[str, Any], key: str, name: str) -> None:
    device = section.get("device")
    if device in ("cpu", "nvme"):
        draft.put(key, device, name)
        if device == "nvme" and section.get("nvme_path"):
            draft.put("parallel.nvme_path", section["nvme_path"], name)
