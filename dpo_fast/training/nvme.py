"""ZeRO 3's optimiser states in files (`parallel.offload_optimizer=nvme`), saved and loaded like others.

DeepSpeed (0.19) copies its swap files into a checkpoint as they are, under names that another run may not
have, and its own file of the optimiser is empty then. Here the file of the optimiser is whole: it is
written from the swap files, which are mapped into memory and not read into it. So such a checkpoint is
exported, resumed on other ranks, and resumed without NVMe, like any other.
"""

from __future__ import annotations

import shutil
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dpo_fast.training import distributed

FP32_GROUPS, STATES = "fp32_flat_groups", "optimizer_state_dict"


def swaps(engine) -> bool:
    """Whether states of an engine's optimiser wait in files."""
    return bool(getattr(engine.optimizer, "swap_optimizer", False))


def save_as_others(engine) -> None:
    """Let an engine that `swaps` save and load whole states."""
    optimizer = engine.optimizer
    # With this it neither copies swap files nor passes over the file of the optimiser.
    engine.zero_nvme_offload_optimizer = lambda: False
    optimizer.state_dict = partial(state_of, optimizer)
    optimizer.load_state_dict = partial(load_state, optimizer)


def remove_files(engine) -> None:
    """Remove this rank's files of an engine that is of no use any more."""
    places = [getattr(p, "nvme_swapper", None) for p in engine.module.parameters()]
    places += [engine.optimizer.optimizer_swapper] if swaps(engine) else []
    for folder in {place.swap_folder for place in places if place is not None}:
        shutil.rmtree(folder, ignore_errors=True)


def state_of(optimizer) -> dict[str, Any]:
    """What DeepSpeed's ZeRO 3 saves of this rank. What waits in files is mapped, not read."""
    found = optimizer._rigid_state_dict()
    flats, states = list(found[FP32_GROUPS]), dict(found[STATES]["state"])
    for group, flat in enumerate(flats):
        if not optimizer._swappable_optimizer_subgroup(group):
            continue
        info = optimizer.optimizer_swapper._get_param_swap_info(flat)
        files = dict(zip(_names(optimizer, flat, info), info.get_swap_paths(), strict=True))
        mapped = {name: _mapped(file, info) for name, file in files.items()}
        flats[group] = mapped.pop("fp32")
        if group in states:
            states[group] = states[group] | mapped
    return found | {FP32_GROUPS: flats, STATES: found[STATES] | {"state": states}}


def load_state(optimizer, state_dict_list: list[dict | None], **_: Any) -> None:
    """What `state_of` gave of this rank, back into memory and files."""
    mine = state_dict_list[distributed.rank()]
    for name in ("loss_scaler", "dynamic_loss_scale", "overflow"):
        setattr(optimizer, name, mine[name])
    for ours, theirs in zip(
        optimizer.optimizer.param_groups, mine[STATES]["param_groups"], strict=True
    ):
        ours |= {name: value for name, value in theirs.items() if name != "params"}
    names: set[str] = set()  # of DeepSpeed's timers
    for group, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
        in_file = optimizer._swappable_optimizer_subgroup(group)
        if in_file:
            optimizer._optimizer_states_and_gradient_swap_in(group, names)
        flat.data.copy_(mine[FP32_GROUPS][group])
        _fill(optimizer.optimizer.state[flat], mine[STATES]["state"].get(group, {}), flat)
        optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if in_file:
            optimizer._optimizer_states_and_gradient_swap_out(group, names)
    if small := optimizer.persistent_parameters:
        small[0].partition(small)


def _names(optimizer, flat: Tensor, info) -> list[str]:
    """The names of a group's tensors in files, in their order: the weights, and what AdamW keeps."""
    states = {id(value): name for name, value in optimizer.optimizer.state.get(flat, {}).items()}
    return ["fp32", *(states[id(tensor)] for tensor in info.get_compute_tensors()[1:])]


def _mapped(file: str, info) -> Tensor:
    return torch.from_file(file, shared=False, size=info.numel(), dtype=info.dtype())


def _fill(state: dict[str, Tensor], saved: dict[str, Tensor], flat: Tensor) -> None:
    """AdamW's states of one flat tensor. Those that it has stay the same objects: files know them."""
    for name, value in saved.items():
        if name in state:
            state[name].data.copy_(value)
        else:
            state[name] = value.to(flat.device if value.dim() else value.device, copy=True)
