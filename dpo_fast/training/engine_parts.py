"""The states of a checkpoint of any ranks and ZeRO stage, into DeepSpeed's engine of others.

DeepSpeed loads only what as many ranks saved at the same stage. Here every rank takes its parts out of the
files of all ranks, puts them together as its own engine would have saved them, and lets the engine's
optimiser load that. So the numbers are the same, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dpo_fast.errors import UserError
from dpo_fast.training import distributed
from dpo_fast.training.engine import split_trained
from dpo_fast.training.engine_states import (
    MOMENTS,
    Place,
    States,
    cut_parameters,
    read_head,
    read_states,
)


def load_engine(engine, folder: Path) -> None:
    """Weights, AdamW's states, schedule and counters into an engine of any ranks and stage. Collective.

    folder: `engine/` of a checkpoint.
    """
    module = engine.module
    head, states = open_states(engine, folder)
    with loading(engine.optimizer):
        put(engine, states, head["lr_scheduler"])
        if engine.zero_optimization_stage() < 3:
            parameters = dict(module.named_parameters())
            for name in states.names:
                weights = states.fp32(name, parameters[name].numel())
                parameters[name].copy_(weights.view(parameters[name].shape))
        for name, buffer in module.named_buffers():
            if name in head["module"]:
                buffer.copy_(head["module"][name])
    engine.lr_scheduler.load_state_dict(head["lr_scheduler"])
    engine.global_steps, engine.global_samples = head["global_steps"], head["global_samples"]
    engine.skipped_steps = head["skipped_steps"]


def open_states(engine, folder: Path) -> tuple[dict[str, Any], States]:
    """The head of a checkpoint, and its states. Raises UserError if they are of another model."""
    module = engine.module
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    order = [names[id(p)] for group in split_trained(module.parameters()) for p in group]
    head = read_head(folder)
    check_order(engine.optimizer, head)
    states = read_states(folder, head, order)
    if states.names != set(order):
        name = min(states.names ^ set(order))
        raise UserError(f"{folder.parent} is of another model: {name} is trained in one of the two")
    return head, states


@contextmanager
def loading(optimizer) -> Iterator[None]:
    """Tell DeepSpeed's optimiser, where it wants to know, that its state is being loaded."""
    if hasattr(optimizer, "checkpoint_event_prologue"):
        optimizer.checkpoint_event_prologue()
    yield
    if hasattr(optimizer, "checkpoint_event_epilogue"):
        optimizer.checkpoint_event_epilogue()


def check_order(optimizer, head: dict[str, Any]) -> None:
    """Raises UserError where DeepSpeed (0.19) records other places of parameters than it uses."""
    name = "round_robin_gradients"
    before = head["ds_config"].get("zero_optimization", {}).get(name, False)
    if before or getattr(optimizer, name, False):
        raise UserError(
            f"parallel.deepspeed.zero_optimization.{name}=true: DeepSpeed does not record where "
            "parameters lie then, so such a checkpoint is resumed only on as many ranks at the same ZeRO "
            "stage, and no other with it. Set it to false, unless the checkpoint was written with it"
        )


def put(engine, states: States, schedule: dict[str, Any]) -> None:
    """This rank's parts of the states into the engine's optimiser.

    schedule: the state of that of the learning rate.
    """
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    own, rank = optimizer.state_dict(), distributed.rank()
    parts = Parts(engine, states)
    if stage == 3:
        own["fp32_flat_groups"], base = parts.fp32, own["optimizer_state_dict"]
        own["optimizer_state_dict"] = base | {"state": parts.moments}
    elif stage:
        own["single_partition_of_fp32_groups"] = parts.fp32
        base = optimizer.optimizer.state_dict()
        own["base_optimizer_state"] = base | {"state": parts.moments}
    elif "fp32_groups" in own:  # bf16
        flat = iter(parts.fp32)
        own["fp32_groups"] = [
            [next(flat).view(each.shape) for each in group] for group in own["fp32_groups"]
        ]
        base = own["optimizer_state_dict"]
        own["optimizer_state_dict"] = base | {"state": parts.shaped(own["fp32_groups"])}
        own["cur_iter"] = schedule["last_epoch"]
    else:
        base = own
        own["state"] = parts.shaped([group["params"] for group in optimizer.param_groups])
    rates = zip(base["param_groups"], schedule["_last_lr"], schedule["base_lrs"], strict=True)
    for group, now, first in rates:
        group |= {"lr": now, "initial_lr": first}
    if stage:
        all_ranks = [own if each == rank else None for each in range(rank + 1)]
        optimizer.load_state_dict(all_ranks, load_from_fp32_weights=True)
    else:
        optimizer.load_state_dict(own)


class Parts:
    """What this rank's optimiser holds, in the flat tensors that it has.

    fp32: the weights. moments: AdamW's states, by the number of the flat tensor.
    """

    def __init__(self, engine, states: States) -> None:
        self.states = states
        names = {id(p): name for name, p in engine.module.named_parameters()}
        self.counts = {
            names[id(p)]: getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters()
        }
        self.places, sizes = layout(engine, names)
        self.fp32 = [torch.zeros(size) for size in sizes]
        moments = [{key: torch.zeros(size) for key in MOMENTS} for size in sizes]
        for name, place in self.places.items():
            count = self.counts[name]
            self._fill(self.fp32, place, states.fp32(name, count))
            for key in MOMENTS:
                flat = [each[key] for each in moments]
                self._fill(flat, place, states.moment(name, key, count))
        steps = [self._step(group) for group in range(len(sizes))]
        self.moments = {
            group: {"step": step.clone(), **moments[group]}
            for group, step in enumerate(steps)
            if step is not None
        }

    def shaped(self, groups: list[list[Tensor]]) -> dict[int, dict[str, Tensor]]:
        """The moments in the shapes of the parameters, where each is a flat tensor of its own."""
        shapes = [each.shape for group in groups for each in group]
        return {
            i: {
                key: value.view(shapes[i]) if key in MOMENTS else value
                for key, value in each.items()
            }
            for i, each in self.moments.items()
        }

    @staticmethod
    def _fill(flat: list[Tensor], place: Place, whole: Tensor) -> None:
        part = whole[place.offset : place.offset + place.count]
        place.of(flat)[: part.numel()].copy_(part)

    def _step(self, group: int) -> Tensor | None:
        """The steps that the parameters of a flat tensor have taken."""
        names = [name for name, place in self.places.items() if place.group == group]
        # A rank that has only padding of a group counts with the others.
        steps = {name: self.states.step(name) for name in names or self.states.names}
        counts = {None if step is None else step.item() for step in steps.values()}
        if len(counts) > 1:
            raise UserError(
                f"AdamW has taken {sorted(int(each or 0) for each in counts)} steps for parameters that "
                "are trained as one tensor above ZeRO 0; resume with parallel.zero_stage=0, where the "
                "checkpoint was written"
            )
        return next(iter(steps.values()))


def cut_groups(optimizer) -> tuple[list[list[nn.Parameter]], list[Tensor]]:
    """Of an optimiser of ZeRO 1 or 2 the parameters of each group, and this rank's part of it in fp32."""
    if hasattr(optimizer, "bf16_groups"):  # what DeepSpeed takes for bf16 at stage 1
        return optimizer.bf16_groups, optimizer.fp32_groups_flat_partition
    return optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups


def layout(engine, names: dict[int, str]) -> tuple[dict[str, Place], list[int]]:
    """Where the engine's optimiser has its parts of parameters, by name, and the sizes of its tensors."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3:
        sizes = [{names[id(p)]: p.ds_numel for p in group} for group in optimizer.fp16_groups]
        places = cut_parameters(sizes, distributed.rank(), distributed.world_size())
        # The flat tensors themselves are empty while they wait in files.
        return places, [int(count) for count in optimizer.fp16_partitioned_groups_flat_numel]
    places = {}
    if stage == 0:
        trained = [p for group in split_trained(engine.module.parameters()) for p in group]
        places = {names[id(p)]: Place(i, 0, p.numel()) for i, p in enumerate(trained)}
        return places, [p.numel() for p in trained]
    groups, flats = cut_groups(optimizer)
    for number, group in enumerate(groups):
        for parameter in group:
            if (part := parameter._hp_mapping) is not None:
                here, there = part.hp_fragment_address, part.lp_fragment_address
                places[names[id(parameter)]] = Place(number, here.start, here.numel, there.start)
    return places, [flat.numel() for flat in flats]
