"""A checkpoint resumed on another number of ranks, or at another ZeRO stage.

Weights and AdamW's states are the same numbers afterwards (`engine_parts.py`), and so are the examples of
every step. Only sums over ranks are added in another order from there on.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dpo_fast.errors import UserError
from dpo_fast.training import data_ranks, distributed
from dpo_fast.training.checkpoints import Stateful, fitting_state, reading, set_random_state
from dpo_fast.training.console import say
from dpo_fast.training.engine_parts import load_engine
from dpo_fast.training.engine_states import read_head
from dpo_fast.training.metrics import PER_RANK
from dpo_fast.training.prepare import Plan, Run
from dpo_fast.training.tensor_files import read_tree

SHARDED = "reference"  # of the stateful parts the one that ZeRO 3 shards
BY_TOKENS = ("tokens_per_batch", "data", "layout", "seed")  # what micro-batches follow from
MOVED = ("world_size", "zero_stage", "sequence_parallel")


def moved(state: Mapping[str, Any], fits: Mapping[str, Any]) -> bool:
    """Whether a checkpoint is of other ranks, or of another ZeRO stage. state: its state.json."""
    if _shared(state) != _shared(fits):
        return True
    return any(state.get(name, fits[name]) != fits[name] for name in ("world_size", "zero_stage"))


def _shared(state: Mapping[str, Any]) -> int:
    """Ranks that share a batch; where it says nothing, none do."""
    return state.get("sequence_parallel", 1)


def data_ranks_of(state: Mapping[str, Any]) -> int:
    """Batches at a time of the run that a checkpoint is of."""
    return state["world_size"] // _shared(state)


def other_groups(engine, folder: Path) -> bool:
    """Whether ZeRO 3 had other groups of parameters (`sub_group_size`) in a checkpoint. Collective."""
    if engine.zero_optimization_stage() < 3:
        return False
    with reading(folder / "engine"):
        head = read_head(folder / "engine")
    name = "sub_group_size"
    before, now = (
        each["zero_optimization"].get(name) for each in (head["ds_config"], engine.config)
    )
    return distributed.any_rank(before != now)


def fits_moved(run: Plan, folder: Path, state: Mapping[str, Any], fits: dict) -> dict:
    """`fits` without what a checkpoint that has `moved` may have otherwise.

    With train.tokens_per_batch the micro-batches of a step say what its examples are, and
    train.global_batch_size only how many they are.

    state: the content of the checkpoint's state.json.

    Raises:
        UserError: the steps would have other examples than on the checkpoint's ranks.
    """
    train, sampler, ranks = run.config.train, run.train.sampler, data_ranks.data_ranks()
    may = set(MOVED)
    same = all(state.get(name) == fits[name] for name in BY_TOKENS if name in fits)
    if train.tokens_per_batch is not None and same:  # what is not is told by its own name
        may.add("global_batch_size")
        accumulation = read_head(folder / "engine")["ds_config"]["gradient_accumulation_steps"]
        before, now = accumulation * data_ranks_of(state), sampler.bins_per_step
        if before != now:
            there = _ranks(state)
            size = max(round(sampler.examples_per_step / now * before), 1)
            remedy = f"set train.global_batch_size={size}, or " if before % ranks == 0 else ""
            raise UserError(
                f"{folder} cannot be resumed on {_ranks(fits)}: train.tokens_per_batch="
                f"{train.tokens_per_batch} with train.global_batch_size={train.global_batch_size} gives a "
                f"step {now} micro-batches, and it had {before} on {there}, so its examples would be "
                f"others; {remedy}resume on {there}"
            )
    return {name: value for name, value in fits.items() if name not in may}


def tell_moved(run: Run, state: Mapping[str, Any]) -> None:
    """Say what a resume elsewhere means for the numbers."""
    modules = list(run.engine.module.modules())
    drops = any(isinstance(each, nn.Dropout) and each.p > 0 for each in modules)
    shared = run.config.parallel.sequence_parallel
    here = {"world_size": distributed.world_size(), "sequence_parallel": shared}
    drops = drops or any(getattr(each, "attention_dropout", 0) for each in modules)
    say(
        f"resumed on {_ranks(here)} at ZeRO {run.config.zero_stage}; the checkpoint is of "
        f"{_ranks(state)} at ZeRO {state['zero_stage']}: from here on the run differs by rounding"
        + (", and by what dropout draws" if drops else "")
    )


def _ranks(state: Mapping[str, Any]) -> str:
    count, shared = state["world_size"], _shared(state)
    return f"{count} rank{'s' if count > 1 else ''}" + (
        f" with sequence_parallel={shared}" if shared > 1 else ""
    )


def load_moved(
    engine,
    folder: Path,
    fits: dict,
    metrics: dict[str, Tensor],
    stateful: Mapping[str, Stateful],
    stage: int,
) -> dict:
    """`load_checkpoint` for a checkpoint that has `moved`. Collective.

    fits: what `fits_moved` leaves of it. stage: of ZeRO, that the engine has.

    Raises:
        UserError: as there, or a state that is not the same on all ranks and cannot be put together.
    """
    state = fitting_state(folder, fits)
    with reading(folder / "engine"), torch.no_grad():
        load_engine(engine, folder / "engine")
    ranks = range(state["world_size"])
    files = [read_tree(folder / f"rank-{rank}.pt", mmap=True) for rank in ranks]
    with reading(folder / "rank-0.pt"):
        counted = files[:: _shared(state)]  # those of a group have the same metrics
        metrics |= merged_metrics([each["metrics"] for each in counted], engine.device)
        for name, part in stateful.items():
            parts, sharded = [each["own"][name] for each in files], name == SHARDED
            load_part(part, name, parts, stage, sharded and state["zero_stage"] == 3)
        rank = distributed.rank()
        if rank < len(files):
            set_random_state(files[rank]["random"])
        else:  # the run has not drawn for this rank yet
            torch.manual_seed((state["seed"] * 1_000_003 + state["step"]) * 8_191 + rank)
    return state


def merged_metrics(ranks: list[dict[str, Tensor]], device: torch.device) -> dict[str, Tensor]:
    """The open window of all data ranks: sums go to the first, and what each counts to each."""
    share = 1.0 if data_ranks.data_rank() == 0 else 0.0
    merged = {}
    for name in {name for each in ranks for name in each}:
        total = sum(each[name] for each in ranks if name in each)
        mine = 1 / len(ranks) if name in PER_RANK else share
        merged[name] = (total * mine).to(device)
    return merged


def load_part(
    part: Stateful, name: str, saved: list[dict[str, Tensor]], stage: int, sharded: bool
) -> None:
    """What changes with the run beside the engine, from what all ranks saved of it.

    sharded: whether each saved its share of every tensor. Else all must have saved the same.
    """
    if not sharded:
        for key in saved[0]:
            if not all(torch.equal(saved[0][key], each[key]) for each in saved):
                raise UserError(
                    f"the state of the {name} ({key}) differs from rank to rank, so it cannot go to other "
                    "ranks; resume on as many ranks and at the parallel.zero_stage of the checkpoint"
                )
    here, rank = part.state_dict(), distributed.rank()
    state = {}
    for key, own in here.items():
        whole = torch.cat([each[key] for each in saved]) if sharded else saved[0][key]
        if stage == 3 and name == SHARDED:
            share = whole.flatten()[rank * own.numel() : (rank + 1) * own.numel()]
            state[key] = torch.zeros_like(own)
            state[key][: share.numel()] = share
        else:
            state[key] = whole.flatten()[: own.numel()].view(own.shape)
    part.load_state_dict(state)
