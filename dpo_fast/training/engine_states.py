"""The optimiser's states in a checkpoint, parameter by parameter, of any ZeRO stage and number of ranks.

Every rank has flat tensors, and parameters lie one after the other in them:

ZeRO 0      each parameter is a flat tensor of its own, and rank 0 has all
ZeRO 1, 2   the parameters of a group, end to end, are cut into as many parts as there are ranks
ZeRO 3      each parameter is cut into as many parts as there are ranks; the last is padded
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpo_fast.training.checkpoint_weights import MODEL_PARTS, WHOLE, optimiser_files
from dpo_fast.training.tensor_files import read_tree

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Place:
    """Where a part of a parameter lies.

    group: number of the flat tensor; start, count: its elements there; offset: the first of them in the
    parameter.
    """

    group: int
    start: int
    count: int
    offset: int = 0

    def of(self, flat: list[Tensor]) -> Tensor:
        return flat[self.group][self.start : self.start + self.count]


@dataclass(frozen=True)
class Shard:
    """What one rank has saved.

    fp32: the weights, a flat tensor for each group.
    moments: AdamW's states of each group, with its `step`; {} for one that has taken no step.
    """

    fp32: list[Tensor]
    moments: list[dict[str, Tensor]]
    places: dict[str, Place]


class States:
    """The states of all ranks. Files are mapped, so only what is asked for is read."""

    def __init__(self, shards: Iterable[Shard]) -> None:
        self.shards = list(shards)

    @property
    def names(self) -> set[str]:
        return {name for shard in self.shards for name in shard.places}

    def fp32(self, name: str, count: int) -> Tensor:
        """The weights of a parameter of so many elements, flat."""
        return self._joined(name, count, lambda shard, place: place.of(shard.fp32))

    def moment(self, name: str, key: str, count: int) -> Tensor:
        """One of `MOMENTS`, flat; zeros if no step was taken."""
        if self.step(name) is None:
            return torch.zeros(count)
        return self._joined(
            name, count, lambda shard, place: place.of([each.get(key) for each in shard.moments])
        )

    def step(self, name: str) -> Tensor | None:
        """How many steps AdamW has taken for a parameter, [] fp32; None for none."""
        shard = next(shard for shard in self.shards if name in shard.places)
        return shard.moments[shard.places[name].group].get("step")

    def _joined(self, name: str, count: int, part) -> Tensor:
        parts = [part(shard, shard.places[name]) for shard in self.shards if name in shard.places]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        if whole.numel() < count:
            raise ValueError(f"{name} has {whole.numel()} elements and not {count}")
        return whole[:count]


def read_head(engine: Path) -> dict[str, Any]:
    """The file that every rank's engine has: counters, schedule, buffers. engine: the folder."""
    whole = engine / WHOLE
    return read_tree(whole if whole.is_file() else min(engine.glob(MODEL_PARTS)), mmap=True)


def read_states(engine: Path, head: dict[str, Any], order: list[str]) -> States:
    """The states of all ranks.

    order: the names of the trained parameters as AdamW counts them; files of ZeRO 0 have no names.
    """
    if head.get("optimizer") is not None:
        return States([_unsharded(head, order)])
    trees = (read_tree(file, mmap=True)["optimizer_state_dict"] for file in optimiser_files(engine))
    if (engine / WHOLE).is_file():
        return States(_cut_groups(tree) for tree in trees)
    return States(_cut_parameters(list(trees), head["param_shapes"]))


def _unsharded(head: dict[str, Any], order: list[str]) -> Shard:
    """Of ZeRO 0. In bf16 the fp32 weights lie beside the optimiser's states."""
    saved = head["optimizer"]
    base = saved.get("optimizer_state_dict", saved)["state"]
    if "fp32_groups" in saved:
        fp32 = list(itertools.chain.from_iterable(saved["fp32_groups"]))
    else:
        fp32 = [head["module"][name] for name in order]
    if len(fp32) != len(order):
        raise ValueError(f"{len(fp32)} parameters are trained there, and {len(order)} here")
    moments = [
        {
            key: value.flatten() if key in MOMENTS else value
            for key, value in base.get(i, {}).items()
        }
        for i in range(len(order))
    ]
    flat = [each.flatten() for each in fp32]
    places = {name: Place(i, 0, each.numel()) for i, (name, each) in enumerate(zip(order, flat))}
    return Shard(flat, moments, places)


def _cut_groups(tree: dict[str, Any]) -> Shard:
    """Of a rank at ZeRO 1 and 2."""
    fp32, base = tree["single_partition_of_fp32_groups"], tree["base_optimizer_state"]
    # zero_optimization.elastic_checkpoint makes a list of what else is a dict.
    states = base if isinstance(base, list) else _by_group(base, len(fp32))
    places = {
        name: Place(group, address.start, address.numel)
        for group, addresses in enumerate(tree["param_slice_mappings"])
        for name, address in addresses.items()
    }
    return Shard(fp32, states, places)


def _cut_parameters(trees: list[dict[str, Any]], shapes: list[dict[str, Any]]) -> Iterator[Shard]:
    """Of every rank at ZeRO 3."""
    sizes = [{name: math.prod(shape) for name, shape in group.items()} for group in shapes]
    for rank, tree in enumerate(trees):
        fp32 = tree["fp32_flat_groups"]
        states = _by_group(tree["optimizer_state_dict"], len(fp32))
        yield Shard(fp32, states, cut_parameters(sizes, rank, len(trees)))


def cut_parameters(sizes: list[dict[str, int]], rank: int, ranks: int) -> dict[str, Place]:
    """Where ZeRO 3 puts a rank's part of each parameter. sizes: of those of each group, by name."""
    places = {}
    for group, counts in enumerate(sizes):
        start = 0
        for name, count in counts.items():
            part = -(-count // ranks)
            places[name] = Place(group, start, part, rank * part)
            start += part
    return places


def _by_group(base: dict[str, Any], count: int) -> list[dict[str, Tensor]]:
    return [base["state"].get(group, {}) for group in range(count)]
