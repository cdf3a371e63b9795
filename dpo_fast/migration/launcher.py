"""accelerate's YAML and FSDP's options: how many processes there are, and what shards them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dpo_fast.errors import UserError
from dpo_fast.migration.deepspeed import AUTO, put_deepspeed
from dpo_fast.migration.draft import Draft
from dpo_fast.migration.files import beside, read_mapping
from dpo_fast.migration.option import flag, listed

# Of accelerate's file: what says how processes are started, which --nproc, torchrun or srun do here.
STARTS = (
    *("compute_environment", "debug", "gpu_ids", "machine_rank", "main_process_ip", "num_machines"),
    *(
        "main_process_port",
        "main_training_function",
        "rdzv_backend",
        "same_network",
        "num_processes",
    ),
    *("mpirun_config", "enable_cpu_affinity", "downcast_bf16", "commands", "command_file"),
    *("tpu_env", "tpu_name", "tpu_zone", "tpu_use_sudo", "tpu_use_cluster", "deepspeed_hostfile"),
)
READ = ("distributed_type", "deepspeed_config", "fsdp_config", "mixed_precision")
NOT_HERE = {
    "dynamo_config": "model.torch_compile compiles layers",
    "fp8_config": "model.fp8 names a recipe of torchao",
    "megatron_lm_config": "Megatron is not used",
    "parallelism_config": "parallel.sequence_parallel splits rows; ZeRO shards the rest",
    "ipex_config": "PyTorch's own code for CPUs is used",
    "use_cpu": "a machine without a GPU trains on its CPU",
}
# Of its section deepspeed_config: what is read, and what the trainer's own options say.
OF_DEEPSPEED = (
    *("zero_stage", "offload_optimizer_device", "offload_param_device", "deepspeed_config_file"),
    *("offload_optimizer_nvme_path", "offload_param_nvme_path", "gradient_accumulation_steps"),
    *("gradient_clipping", "zero3_init_flag", "zero3_save_16bit_model", "deepspeed_hostfile"),
    *(
        "deepspeed_multinode_launcher",
        "deepspeed_moe_layer_cls_names",
        "deepspeed_inclusion_filter",
    ),
    "deepspeed_exclusion_filter",
)
# Of FSDP, with and without fsdp_ before it: what is read, and what ZeRO does by itself.
OF_FSDP = (
    *("sharding_strategy", "reshard_after_forward", "offload_params", "activation_checkpointing"),
    *("version", "auto_wrap_policy", "transformer_layer_cls_to_wrap", "min_num_params"),
    *("backward_prefetch", "backward_prefetch_policy", "forward_prefetch", "limit_all_gathers"),
    *("use_orig_params", "sync_module_states", "cpu_ram_efficient_loading", "state_dict_type"),
    *("final_state_dict_type", "cpu_offload_pin_memory", "mixed_precision_policy"),
)
STAGES = {  # what FSDP shards, and the stage of ZeRO that does: 1 and 2 of its own are numbers for the same
    **dict.fromkeys(("FULL_SHARD", "1", "HYBRID_SHARD", "4"), 3),
    **dict.fromkeys(("SHARD_GRAD_OP", "2", "HYBRID_SHARD_ZERO2", "5"), 2),
    **dict.fromkeys(("NO_SHARD", "3"), 0),
}


def put_accelerate(draft: Draft, config: dict[str, Any], name: str, file: Path | None) -> None:
    """A configuration of `accelerate`. name: of it, for messages. file: where it stands."""
    kind = str(config.get("distributed_type", "NO")).upper()
    if kind == "DEEPSPEED":
        _deepspeed(draft, dict(config.get("deepspeed_config") or {}), name, file)
    elif kind == "FSDP":
        put_fsdp(draft, dict(config.get("fsdp_config") or {}), name)
    elif kind in ("MULTI_GPU", "MULTI_CPU"):
        draft.put("parallel.zero_stage", 0, name, comment="DDP there: whole models on every rank")
    elif kind not in ("NO", "NONE"):
        draft.lose(f"{name}: distributed_type={kind}", "choose parallel.zero_stage")
    if str(config.get("mixed_precision", "no")) in ("fp16", "fp8"):
        draft.lose(f"{name}: mixed_precision", "bf16 stands in its place")
    for key, value in config.items():
        if key in NOT_HERE and value not in (None, False, {}, []):
            draft.lose(f"{name}: {key}", NOT_HERE[key])
        elif key not in (*STARTS, *READ, *NOT_HERE):
            draft.lose(f"{name}: {key}", "no key of accelerate that the import knows")


def _deepspeed(draft: Draft, own: dict[str, Any], name: str, file: Path | None) -> None:
    if named := own.get("deepspeed_config_file"):
        key = f"{name}: deepspeed_config_file"
        try:
            found = beside(str(named), file or Path(draft.place), "DeepSpeed configuration", key)
            put_deepspeed(draft, read_mapping(found), name)
        except UserError:
            draft.lose(key, f"{named} cannot be read from here: set parallel.zero_stage")
        return
    zero: dict[str, Any] = {"stage": own.get("zero_stage", AUTO)}
    for theirs, section in (("optimizer", "offload_optimizer"), ("param", "offload_param")):
        device = own.get(f"offload_{theirs}_device")
        path = own.get(f"offload_{theirs}_nvme_path")
        zero[section] = {"device": device} | ({"nvme_path": path} if path else {})
    put_deepspeed(draft, {"zero_optimization": zero}, name)
    for key in sorted(set(own) - set(OF_DEEPSPEED)):
        draft.lose(
            f"{name}: deepspeed_config.{key}", "write it to parallel.deepspeed if you need it"
        )


def put_fsdp(draft: Draft, config: dict[str, Any], name: str, words: Any = None) -> None:
    """FSDP as the stage of ZeRO that shards the same things.

    name: of the option that asks for it. words: of transformers' option fsdp, as in `full_shard offload`.
    """
    own = {key.removeprefix("fsdp_"): value for key, value in config.items()}
    asked = [str(each).upper() for word in listed(words) for each in str(word).split()]
    kind = next((each for each in asked if each in STAGES), None)
    kind = kind or str(own.get("sharding_strategy") or "FULL_SHARD").upper()
    again = own.get("reshard_after_forward", True)
    kind = str(again).upper() if str(again).upper() in STAGES else kind
    stage = STAGES.get(kind, 3)
    if stage == 3 and str(again).lower() in ("false", "no", "0"):
        stage, kind = 2, "reshard_after_forward: false"
    draft.put(
        "parallel.zero_stage", stage, name, comment=f"FSDP there, {kind}: ZeRO shards the same"
    )
    if kind.startswith("HYBRID"):
        draft.lose(
            f"{name}: {kind}", "set parallel.zero_hpz_partition_size to the GPUs of a machine"
        )
    if "OFFLOAD" in asked or flag(own.get("offload_params", False)):
        draft.put("parallel.offload_optimizer", "cpu", name)
        if stage == 3:
            draft.put("parallel.offload_parameters", "cpu", name)
    if flag(own.get("activation_checkpointing", False)):
        draft.put("model.gradient_checkpointing", True, name)
    for key in sorted(set(own) - set(OF_FSDP)):
        if own[key] not in (None, False):
            draft.lose(f"{name}: {key}", "no key of FSDP that the import knows")


def ranks_of(config: dict[str, Any]) -> int | None:
    """Processes of a configuration of accelerate."""
    number = str(config.get("num_processes") or "")
    return (int(number) or None) if number.isdigit() else None
