"""The DeepSpeed engine: its configuration derived from ours, its optimiser and schedule from torch."""

from __future__ import annotations

import contextlib
import hashlib
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dpo_fast.errors import UserError
from dpo_fast.models import ScoringModel
from dpo_fast.models.buffers import kept_in_fp32
from dpo_fast.models.experts import join_experts
from dpo_fast.models.load import load_skeleton
from dpo_fast.training import distributed
from dpo_fast.training.config import RunConfig
from dpo_fast.training.nvme import remove_files, save_as_others, swaps
from dpo_fast.training.optimisers import OPTIMISERS, make
from dpo_fast.training.parallel_section import ZERO_PLUS_PLUS
from dpo_fast.training.schedule import build_schedule
from dpo_fast.training.zero_mends import (
    follow_new_order,
    forget_modules,
    keep_names_of_the_model,
    record_whole_passes,
    share_groups,
)

# DeepSpeed's monitors, which log.report_to stands for.
MONITORS = ("tensorboard", "wandb", "csv_monitor", "comet")
_open: weakref.WeakSet = weakref.WeakSet()  # engines of this process that nobody has let go of


def deepspeed_config(config: RunConfig, world_size: int, accumulation: int) -> dict[str, Any]:
    """Our configuration in DeepSpeed's words, with `parallel.deepspeed` merged in.

    accumulation: micro-batches of every rank in a step.

    Raises:
        UserError: a value of `parallel.deepspeed` contradicts one that follows from our options.
    """
    bf16 = config.model.precision == "bf16"
    # Without its look at the gradient DeepSpeed would take a step that is not finite.
    looks = {"check_grad_overflow": True} if bf16 else {}
    # DeepSpeed insists on a number. With train.tokens_per_batch there is none, and nothing depends on it.
    micro = config.train.micro_batch_size or 1
    derived: dict[str, Any] = {
        "train_batch_size": micro * accumulation * world_size,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.train.max_grad_norm,
        "bf16": {"enabled": bf16, **looks},
        "zero_optimization": _zero(config),
        # torch's AdamW is the optimiser at every stage, also where DeepSpeed would build its own.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
        # It would wait for the GPU before and after every micro-batch, for a rate that nobody prints.
        "timers": {"throughput": {"enabled": False}},
    }
    if OPTIMISERS[config.train.optim].theirs:
        derived["zero_allow_untested_optimizer"] = True
    if bf16 and config.zero_stage:  # DeepSpeed's stage 0 sums bf16 gradients in bf16 only
        derived["data_types"] = {"grad_accum_dtype": "fp32"}
    derived |= {name: {"enabled": False} for name in MONITORS}
    return merge(derived, config.parallel.deepspeed, "parallel.deepspeed")


def _zero(config: RunConfig) -> dict[str, Any]:
    """DeepSpeed's section `zero_optimization`."""
    parallel = config.parallel
    zero: dict[str, Any] = {"stage": config.zero_stage}
    if config.zero_stage:
        zero["overlap_comm"] = torch.cuda.is_available()
        zero["contiguous_gradients"] = True
        zero["compute_grad_norm"] = True
    if parallel.offload_optimizer:
        zero["offload_optimizer"] = offloaded_to(parallel.offload_optimizer, config)
    if parallel.offload_parameters:
        zero["offload_param"] = offloaded_to(parallel.offload_parameters, config)
    for option in ZERO_PLUS_PLUS:
        if option in parallel.model_fields_set:
            zero[option] = getattr(parallel, option)
    return zero


def zero_config(config: RunConfig) -> dict[str, Any]:
    """DeepSpeed's section `zero_optimization`, with that of `parallel.deepspeed` merged in.

    Raises:
        UserError: as `deepspeed_config`.
    """
    theirs = config.parallel.deepspeed.get("zero_optimization", {})
    if not isinstance(theirs, dict):  # whatever it is, it contradicts
        theirs = {"stage": theirs}
    return merge(_zero(config), theirs, "parallel.deepspeed.zero_optimization")


def merge(ours: dict, theirs: dict, place: str) -> dict:
    """`theirs` added to `ours`, both in DeepSpeed's words. place: the option that holds `theirs`.

    Raises:
        UserError: the two have different values for one key.
    """
    merged = dict(ours)
    for name, value in theirs.items():
        if isinstance(value, dict) and isinstance(merged.get(name, {}), dict):
            merged[name] = merge(merged.get(name, {}), value, f"{place}.{name}")
        elif name in merged and merged[name] != value and value != "auto":
            raise UserError(
                f"{place}.{name}={value!r} contradicts {merged[name]!r}, which follows from the other "
                "sections of the configuration; remove it there"
            )
        elif value != "auto":
            merged[name] = value
    return merged


def in_cpu_memory() -> dict[str, Any]:
    """DeepSpeed's words for offloading. Pages are pinned where there is a GPU to copy to."""
    return {"device": "cpu", "pin_memory": torch.cuda.is_available()}


def offloaded_to(place: str | bool, config: RunConfig) -> dict[str, Any]:
    """DeepSpeed's words for offloading to CPU memory (true, "cpu") or to files ("nvme").

    Every run has a folder of its own below `parallel.nvme_path`: DeepSpeed's names are the same in all.
    """
    if place != "nvme":
        return in_cpu_memory()
    run = str(Path(config.train.output_dir).expanduser().absolute())
    own = f"dpo_fast-{hashlib.sha256(run.encode()).hexdigest()[:12]}"
    folder = Path(config.parallel.nvme_path).expanduser() / own
    return in_cpu_memory() | {"device": "nvme", "nvme_path": str(folder)}


def reference_config(config: RunConfig, ds_config: dict[str, Any]) -> dict[str, Any]:
    """DeepSpeed's configuration for a frozen model at stage 3: the policy's without its optimiser.

    Parameters lie in CPU memory if `reference.offload` says so.
    """
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    zero = dict(ds_config["zero_optimization"])
    for name in ("offload_optimizer", "zero_quantized_gradients"):  # it has none of either
        zero.pop(name, None)
    zero.pop("offload_param", None)
    if (
        config.offloads_reference
    ):  # never to files: a second model would empty the folder of the first
        zero["offload_param"] = in_cpu_memory()
    reduced = {name: ds_config[name] for name in (*names, "bf16", "steps_per_print", "timers")}
    return reduced | {"zero_optimization": zero}


@contextlib.contextmanager
def shard_while_loading(config: RunConfig, ds_config: dict[str, Any]) -> Iterator[None]:
    """Inside, at stage 3, transformers shards weights while it loads them.

    It does so as long as an object lives, which the traceback of an error would keep alive.
    """
    if config.zero_stage < 3:
        yield
        return
    zero = ds_config["zero_optimization"]
    follow_new_order()
    keep_names_of_the_model()
    record_whole_passes()
    share_groups(zero.get("zero_hpz_partition_size", 1))
    if zero.get("offload_param", {}).get("device") == "nvme":
        zero["offload_param"].setdefault("buffer_size", largest_part(config))
    if ds_config["bf16"]["enabled"]:
        ds_config = keeping_buffers(config, ds_config)
    from transformers.integrations import HfDeepSpeedConfig, deepspeed

    before = deepspeed._hf_deepspeed_config_weak_ref
    lives = HfDeepSpeedConfig(ds_config)
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = before
        del lives


def keeping_buffers(config: RunConfig, ds_config: dict[str, Any]) -> dict[str, Any]:
    """A configuration with the buffers that stay in fp32 while a model is loaded in bf16."""
    types = {"keep_in_fp32_modules": kept_in_fp32(load_skeleton(config.model))}
    return ds_config | {"data_types": types | ds_config.get("data_types", {})}


def largest_part(config: RunConfig) -> int:
    """Elements of the largest part of a parameter that a rank has at stage 3."""
    sizes = (parameter.numel() for parameter in load_skeleton(config.model).parameters())
    return -(-max(sizes) // distributed.world_size())


def split_trained(
    parameters: Iterable[nn.Parameter],
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Those that are trained, in the optimiser's order: matrices, and vectors."""
    trained = [p for p in parameters if p.requires_grad]
    # A sharded parameter hides its shape; DeepSpeed keeps the true one in ds_shape.
    matrices = [p for p in trained if len(getattr(p, "ds_shape", p.shape)) >= 2]
    known = {id(p) for p in matrices}
    return matrices, [p for p in trained if id(p) not in known]


def build_optimizer(config: RunConfig, model: torch.nn.Module) -> torch.optim.Optimizer:
    """AdamW (`train.optim`), with weight decay on matrices only.

    DeepSpeed gives it a few flat tensors. One operation after the other would move three times the bytes.
    """
    matrices, vectors = split_trained(model.parameters())
    groups = [
        {"params": matrices, "weight_decay": config.train.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return make(config, [group for group in groups if group["params"]])


def build_engine(config: RunConfig, model: ScoringModel, ds_config: dict, total_steps: int):
    """A DeepSpeed engine for the scoring model, with AdamW and a schedule of transformers."""
    import deepspeed
    from deepspeed.runtime import bf16_optimizer

    # It collects garbage and prints the memory at six places, whatever the level of DeepSpeed's log.
    bf16_optimizer.see_memory_usage = lambda *args, **kwargs: None
    if distributed.world_size() > 1 or config.zero_stage == 3:
        join_experts(model, config.zero_stage)
    # transformers loads layers for evaluation, where they neither recompute nor drop anything.
    model.train()
    optimizer = build_optimizer(config, model)
    scheduler = build_schedule(config.train.schedule, optimizer, total_steps)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, lr_scheduler=scheduler, config=ds_config
    )
    _open.add(engine)
    if swaps(engine):
        save_as_others(engine)
    return engine


def build_reference_engine(config: RunConfig, model: ScoringModel, ds_config: dict):
    """The model frozen, to score with; at stage 3 in an engine. ds_config: from `reference_config`."""
    model.requires_grad_(False)
    model.eval()
    if config.zero_stage < 3:
        return model
    import deepspeed

    join_experts(model, config.zero_stage)
    engine, *_ = deepspeed.initialize(model=model, config=ds_config)
    _open.add(engine)
    engine.eval()
    return engine


@contextlib.contextmanager
def engines_released() -> Iterator[None]:
    """Afterwards the engines that were made inside are let go of, also where an error ends it.

    After an error on several ranks they stay: letting go waits for all ranks, and the process ends anyway.
    """
    before = list(_open)
    try:
        yield
    except BaseException:
        if distributed.world_size() == 1:
            with contextlib.suppress(
                Exception
            ):  # they may be in any state, and the error is to be told
                release(*(each for each in _open if each not in before))
        raise
    release(*(each for each in _open if each not in before))


def release(*holders: object) -> None:
    """Let go of engines, or of what scores with one. Later runs of the process need their memory.

    DeepSpeed hooks itself to every parameter, which no collection of garbage undoes. The model and the
    optimiser are of no use afterwards.
    """
    engines = {id(each): each for each in (getattr(holder, "scorer", holder) for holder in holders)}
    for engine in engines.values():
        if hasattr(engine, "destroy"):
            _open.discard(engine)
            remove_files(engine)
            engine.destroy()
            forget_modules(engine.module)
            for parameter in engine.module.parameters():
                parameter.grad = None
                for tensor in (parameter, getattr(parameter, "ds_tensor", parameter)):
                    tensor.data = tensor.data.new_empty(0)
            if isinstance(base := getattr(engine, "basic_optimizer", None), torch.optim.Optimizer):
                base.state.clear()
                for group in base.param_groups:
                    for flat in group["params"]:
                        flat.data = flat.data.new_empty(0)
            if engine.optimizer is not None:
                vars(engine.optimizer).clear()
