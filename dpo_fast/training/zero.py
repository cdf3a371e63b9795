"""`parallel.zero_stage=auto`: the stage of ZeRO that the number of ranks needs."""

from __future__ import annotations

from typing import Any

from dpo_fast.ops.dispatch import Choice


def choose_stage(config: Any, world_size: int) -> Choice:
    """The stage of a run (`RunConfig`, which asks for it) on so many ranks, by its number, and why.

    One rank has nothing to shard. DeepSpeed's stage 0 sums gradients in the dtype of the weights, so bf16
    takes stage 1, which sums in fp32. Several ranks shard everything: what fits at stage 3 may not at 2.
    """
    parallel = config.parallel
    if parallel.zero_stage != "auto":
        return Choice(str(parallel.zero_stage), "asked for by number")
    given = parallel.deepspeed.get("zero_optimization", {})
    given = given if isinstance(given, dict) else {}
    if isinstance(given.get("stage"), int):
        return Choice(str(given["stage"]), "parallel.deepspeed.zero_optimization.stage says so")
    if parallel.offload_parameters or config.reference.offload:
        return Choice("3", "parameters are offloaded")
    if option := parallel.needs_stage_3:
        return Choice("3", f"parallel.{option} is of stage 3")
    if any(name.startswith("stage3_") for name in given):
        return Choice("3", "parallel.deepspeed has options of stage 3")
    if world_size > 1:
        if config.model.torch_compile:
            return Choice("2", "several ranks, and torch_compile goes up to stage 2")
        if option := config.model.whole_weights:
            return Choice("2", f"several ranks, and {option} goes up to stage 2")
        return Choice("3", "several ranks shard states, gradients and parameters")
    if parallel.offload_optimizer:
        return Choice("2", "the optimiser is offloaded")
    if config.model.precision == "bf16":
        return Choice("1", "one rank shards nothing; stage 1 sums gradients in fp32")
    return Choice("0", "one rank has nothing to shard")
