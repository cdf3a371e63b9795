"""`train.optimizer_from`: a new run that begins with the optimiser's state of another one's end."""

from __future__ import annotations

from pathlib import Path

import torch

from dpo_fast.errors import UserError
from dpo_fast.training import distributed
from dpo_fast.training.checkpoints import check_whole, is_checkpoint, reading
from dpo_fast.training.console import say
from dpo_fast.training.engine_parts import Parts, cut_groups, loading, open_states, put
from dpo_fast.training.engine_states import States


def carry_optimizer(engine, checkpoint: str) -> None:
    """Put AdamW's states of a checkpoint, of any ranks and ZeRO stage, into a new engine. Collective.

    They are its means of gradients, its count of steps and, in bf16, the weights in fp32. The schedule, and
    the options of AdamW, are those of the new run.

    Raises:
        UserError: it is no checkpoint, is damaged, or is of other weights than the engine has.
    """
    folder, option = Path(checkpoint), f"train.optimizer_from={checkpoint}"
    if not distributed.from_main(lambda: is_checkpoint(folder)):
        raise UserError(f"{option} is not a checkpoint: expected a folder checkpoint-N of a run")
    check_whole(folder)
    with reading(folder / "engine"), torch.no_grad():
        _, states = open_states(engine, folder / "engine")
        if distributed.any_rank(not same_weights(engine, states)):
            raise UserError(
                f"{option} is of other weights than model.path, so its means of gradients are not those of "
                "this model: name the last checkpoint of the run that made model.path, or leave it out"
            )
        with loading(engine.optimizer):
            put(engine, states, engine.lr_scheduler.state_dict())
    say(f"AdamW goes on with its states of {folder}")


def same_weights(engine, states: States) -> bool:
    """Whether this rank's parts of the weights are those of the states, in the dtype of the engine."""
    own, dtype = weights_of(engine), next(engine.module.parameters()).dtype
    there = Parts(engine, states).fp32
    return all(
        torch.equal(mine.detach().flatten().cpu().to(dtype), each.to(dtype))
        for mine, each in zip(own, there, strict=True)
    )


def weights_of(engine) -> list[torch.Tensor]:
    """The flat fp32 tensors of the engine's optimiser, as `Parts.fp32` has them."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3:
        return list(optimizer.state_dict()["fp32_flat_groups"])
    if stage:
        return list(cut_groups(optimizer)[1])
    own = optimizer.state_dict()
    groups = own.get(
        "fp32_groups", [group["params"] for group in optimizer.param_groups]
    )  # bf16 has
    return [each for group in groups for each in group]
