"""Checkpoints that are complete or absent, and exact resume.

output_dir/checkpoint-40/     engine/       DeepSpeed's shards: weights, optimiser, schedule
                              rank-0.pt     one for each rank: random state, metrics since the last
                                            line, state of a reference that follows the policy
                              state.json    the step, and what a resumed run must share
output_dir/latest             name of the newest, written last
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor

from dpo_fast import durable
from dpo_fast.errors import UserError
from dpo_fast.training import distributed

PREFIX, LATEST = "checkpoint-", "latest"


class Stateful(Protocol):
    """A part of a run that has a state, as tensors by name."""

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...


def save_checkpoint(
    engine,
    output_dir: str,
    state: dict,
    metrics: dict[str, Tensor],
    keep: int,
    stateful: Mapping[str, Stateful] = MappingProxyType({}),
) -> Path:
    """Write a checkpoint, then `latest`, then remove all but the newest `keep`. Collective.

    state: for state.json; holds at least `step`.
    metrics: sums of the open window.
    stateful: parts of the run that change with it.

    Raises:
        UserError: it cannot be written; the older ones are whole.
    """
    root = Path(output_dir)
    final = root / f"{PREFIX}{state['step']}"
    aside = durable.aside(final)
    if distributed.is_main():
        shutil.rmtree(aside, ignore_errors=True)
        with saving(aside):
            aside.mkdir(parents=True)
    distributed.barrier()
    with saving(aside):
        engine.save_checkpoint(str(aside), tag="engine", save_latest=False)
        own = {name: each.state_dict() for name, each in stateful.items()}
        mine = {"random": _random_state(), "metrics": metrics, "own": own}
        torch.save(mine, aside / f"rank-{distributed.rank()}.pt")
    distributed.barrier()
    if distributed.is_main():
        with saving(aside):
            (aside / "state.json").write_text(json.dumps(state, indent=2))
            durable.publish(aside, final, replace=True)
        with saving(root / LATEST):
            durable.write_file(root / LATEST, final.name)
        for old in _by_age(checkpoints(root), final)[:-keep]:
            shutil.rmtree(old)
    distributed.barrier()
    return final


def find_checkpoint(requested: bool | str, output_dir: str) -> Path | None:
    """The checkpoint that `train.resume_from_checkpoint` asks for.

    requested: false for none, true for the newest of output_dir if there is one, or a folder.

    Raises:
        UserError: the named folder is not a checkpoint.
    """
    if requested is False:
        return None
    if requested is True:
        return _newest(Path(output_dir))
    folder = Path(requested)
    if not (folder / "state.json").is_file():
        raise UserError(
            f"train.resume_from_checkpoint={requested} is not a checkpoint: expected a folder "
            f"{PREFIX}N with state.json; to continue the latest of output_dir set it to true"
        )
    return folder


def load_checkpoint(
    engine,
    folder: Path,
    fits: dict,
    metrics: dict[str, Tensor],
    stateful: Mapping[str, Stateful] = MappingProxyType({}),
) -> dict:
    """Restore engine, random state, `metrics` and `stateful` in place; returns the content of state.json.

    fits: what must be as it was (world size, data, batch size, ...), by its name in state.json.

    Raises:
        UserError: the checkpoint is of a run that differs in one of `fits`, or is damaged.
    """
    state = _read_state(folder, fits)
    with _reading(folder / "engine"):
        path, _ = engine.load_checkpoint(str(folder), tag="engine")
    if path is None:
        raise UserError(f"{folder}: DeepSpeed finds no checkpoint in its folder engine/")
    file = folder / f"rank-{distributed.rank()}.pt"
    with _reading(file):
        mine = torch.load(file, weights_only=True, map_location="cpu")
    metrics |= {name: value.to(engine.device) for name, value in mine["metrics"].items()}
    for name, each in stateful.items():
        each.load_state_dict(mine["own"][name])
    random_state = mine["random"]
    torch.set_rng_state(random_state["cpu"])
    if "cuda" in random_state:
        torch.cuda.set_rng_state(random_state["cuda"])
    return state


def checkpoints(root: Path) -> list[Path]:
    """Complete checkpoints, in the order of their steps."""
    steps = {p: p.name.removeprefix(PREFIX) for p in root.glob(f"{PREFIX}*")}
    found = [p for p, step in steps.items() if step.isdecimal() and (p / "state.json").is_file()]
    return sorted(found, key=lambda p: int(steps[p]))


def saving(place: Path) -> AbstractContextManager[None]:
    """`durable.writing` for the files of a run.

    torch and safetensors have errors of their own for a full disk.
    """
    remedy = (
        "The checkpoints that are done are whole: make room, and go on with "
        "train.resume_from_checkpoint=true"
    )
    return durable.writing(place, remedy, (OSError, RuntimeError, SafetensorError))


def _by_age(found: list[Path], newest: Path) -> list[Path]:
    """Oldest first. Steps beyond the newest are left of an earlier, longer run in the folder."""
    ours = found.index(newest) + 1
    return found[ours:] + found[:ours]


def _newest(root: Path) -> Path | None:
    """The checkpoint that `latest` names, or else the one of the highest step."""
    latest = root / LATEST
    if latest.is_file():
        named = root / latest.read_text(errors="replace").strip()
        if (named / "state.json").is_file():
            return named
    return next(reversed(checkpoints(root)), None)


def _read_state(folder: Path, fits: dict) -> dict[str, Any]:
    """The content of state.json. Raises UserError if it cannot be read, or differs from `fits`."""
    try:
        state = json.loads((folder / "state.json").read_text())
        if not isinstance(state, dict):
            raise ValueError("it holds no object")
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}/state.json cannot be read: {error}") from None
    differing = [name for name in fits if name in state and state[name] != fits[name]]
    if differing:
        details = "; ".join(f"{n} was {state[n]!r} and is {fits[n]!r}" for n in differing)
        raise UserError(
            f"{folder} cannot be resumed exactly: {details}. Set it back, or start a new run from "
            "this one's weights with another train.output_dir"
        )
    missing = [name for name in fits if name not in state]
    if missing:
        raise UserError(
            f"{folder} cannot be resumed: another version of dpo_fast wrote it, and its state.json lacks "
            f"{', '.join(missing)}. Resume with that version, or start a new run from this one's weights "
            "with another train.output_dir"
        )
    return state


@contextmanager
def _reading(place: Path) -> Iterator[None]:
    """Tell a damaged file as a UserError. torch raises nearly anything when it reads one."""
    try:
        yield
    except Exception as error:
        raise UserError(
            f"{place} cannot be read: {durable.first_line(error)} The checkpoint is damaged or of another "
            "model: name an earlier one with train.resume_from_checkpoint, or start a new run"
        ) from error


def _random_state() -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    return state | {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else state
