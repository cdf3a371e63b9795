"""The trained weights of a checkpoint, whole, on any number of ranks.

DeepSpeed keeps them in engine/. Stages 0 to 2 have them whole, in the dtype of the run. At stage 3 every
rank has a part: of each parameter in turn a share of its elements, fp32, in the optimiser's flat groups.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from dpo_fast.errors import UserError
from dpo_fast.models.lora_start import is_taken
from dpo_fast.training import distributed
from dpo_fast.training.tensor_files import read_tree

WHOLE = "mp_rank_00_model_states.pt"
MODEL_PARTS = "*zero_pp_rank_*_mp_rank_00_model_states.pt"
MODEL_PART = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_00_model_states\.pt")
OPTIMISER_PART = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt")
PREFIX = "model."  # of the transformers model, or peft's, in a ScoringModel


def read_trained(folder: Path, model: nn.Module) -> dict[str, Tensor]:
    """The trained tensors of a checkpoint, as `gather_trained` gives those of a run. On one rank.

    folder: of a checkpoint that `check_whole` has passed.
    model: tells what is trained, and which names share a Parameter; its weights are not read.

    Raises:
        UserError: the checkpoint cannot be read, or is of another model.
    """
    found = dict(_tensors(folder / "engine"))
    own = model.state_dict(keep_vars=True)
    known = {id(own[name]): found[PREFIX + name] for name in own if PREFIX + name in found}
    trained = {n: value for n, value in own.items() if value.requires_grad or is_taken(n)}
    missing = [name for name, value in trained.items() if id(value) not in known]
    wrong = [
        name
        for name, value in trained.items()
        if name not in missing and known[id(value)].shape != _shape(value)
    ]
    if missing or wrong:
        name = (missing or wrong)[0]
        what = "lacks" if missing else "has another shape of"
        raise UserError(
            f"{folder} is of another model: it {what} {name}, which the configuration trains; give the "
            "configuration that it was trained with"
        )
    return {name: known[id(value)] for name, value in trained.items()}


def read_on_main(folder: Path, model: nn.Module) -> dict[str, Tensor]:
    """`read_trained` on rank 0; {} on the others, which raise the same errors. Collective.

    folder: of a checkpoint that `check_whole` has passed.
    """
    found: dict[str, Tensor] = {}
    distributed.from_main(lambda: found.update(read_trained(folder, model)))
    return found


def trained_names(model: nn.Module) -> list[str]:
    """The names of what is trained, one of each Parameter."""
    own = model.state_dict(keep_vars=True).items()
    carried = ((name, value) for name, value in own if value.requires_grad or is_taken(name))
    first = {id(value): name for name, value in reversed(list(carried))}
    return list(first.values())


def load_trained(model: nn.Module, names: Iterable[str], state: Mapping[str, Tensor]) -> None:
    """Put tensors of these names, which rank 0 has, into a model, sharded or whole. Collective."""
    own = model.state_dict(keep_vars=True)
    for name in names:
        value = own[name]
        with _gathered(value), torch.no_grad():
            if distributed.is_main():
                value.data.copy_(state[name])
        if not hasattr(value, "ds_id") and distributed.world_size() > 1:
            torch.distributed.broadcast(value.data, 0)


def _gathered(value: Tensor) -> contextlib.AbstractContextManager:
    if not hasattr(value, "ds_id"):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([value], modifier_rank=0)


def _shape(value: Tensor) -> torch.Size:
    return torch.Size(getattr(value, "ds_shape", value.shape))


def _tensors(engine: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that is trained, and others, by the names of the scoring model."""
    whole = engine / WHOLE
    if whole.is_file():
        yield from read_tree(whole, mmap=True)["module"].items()
        return
    part = next(engine.glob(MODEL_PARTS), None)
    if part is None:
        raise UserError(f"{engine} holds no weights")
    head = read_tree(part, mmap=True)
    shapes = {name: shape for group in head["param_shapes"] for name, shape in group.items()}
    for name, value in _joined(shapes, [_flat(file) for file in optimiser_files(engine)]):
        yield (
            name,
            value.to(head["module"][name].dtype),
        )  # an empty tensor there, of the run's dtype
    yield from _taken(engine, head.get("frozen_param_shapes") or {})


def _taken(engine: Path, shapes: Mapping[str, torch.Size]) -> Iterator[tuple[str, Tensor]]:
    """What belongs to trained adapters though it is not trained. Every rank has a part of each."""
    names = [name for name in shapes if is_taken(name)]
    if not names:
        return
    found = ((MODEL_PART.fullmatch(file.name), file) for file in engine.iterdir())
    files = [file for _, file in sorted((int(match[1]), file) for match, file in found if match)]
    parts = [read_tree(file, mmap=True)["frozen_param_fragments"] for file in files]
    for name in names:
        whole = torch.cat([part[name].flatten() for part in parts])
        yield name, whole[: math.prod(shapes[name])].view(shapes[name])


def _joined(shapes: Mapping[str, torch.Size], flat: list[Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Parameters from the parts of all ranks. The last parts are padded."""
    begin = 0
    for name, shape in shapes.items():
        count = math.prod(shape)
        end = begin + -(-count // len(flat))
        yield name, torch.cat([each[begin:end] for each in flat])[:count].view(shape)
        begin = end


def optimiser_files(engine: Path) -> list[Path]:
    """The files of the optimisers, in the order of the ranks."""
    found = ((OPTIMISER_PART.fullmatch(file.name), file) for file in engine.iterdir())
    return [file for _, file in sorted((int(match[1]), file) for match, file in found if match)]


def _flat(file: Path) -> Tensor:
    """A rank's part of all trained parameters, fp32, one after the other."""
    groups = read_tree(file, mmap=True)["optimizer_state_dict"]["fp32_flat_groups"]
    return groups[0] if len(groups) == 1 else torch.cat(groups)
