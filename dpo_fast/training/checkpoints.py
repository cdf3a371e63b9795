"""Checkpoints that are complete or absent, and exact resume.

output_dir/checkpoint-40/     engine/       DeepSpeed's shards: weights, optimiser, schedule
                              rank-0.pt     of each rank: random state, metrics since the last line,
                                            what else changes (a reference that follows the policy)
                              state.json    step and what it belongs to
output_dir/latest             the name of the newest, written last
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor

from dpo_fast.errors import UserError
from dpo_fast.training import distributed

PREFIX = "checkpoint-"


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
    """Written aside, flushed, renamed; `latest` last; then all but the newest `keep` are removed.

    Collective. `state` holds at least `step`; `stateful` are parts of the run that change with it.
    """
    root = Path(output_dir)
    final = root / f"{PREFIX}{state['step']}"
    aside = root / f".{final.name}.partial"
    if distributed.is_main():
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    distributed.barrier()
    with writing(aside):
        engine.save_checkpoint(str(aside), tag="engine", save_latest=False)
        own = {name: each.state_dict() for name, each in stateful.items()}
        mine = {"random": _random_state(), "metrics": metrics, "own": own}
        torch.save(mine, aside / f"rank-{distributed.rank()}.pt")
    distributed.barrier()
    if distributed.is_main():
        with writing(aside):
            (aside / "state.json").write_text(json.dumps(state, indent=2))
            _flush(aside)
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
        with writing(root):
            _write_whole(root / "latest", final.name)
        for old in _by_age(checkpoints(root), final)[:-keep]:
            shutil.rmtree(old)
    distributed.barrier()
    return final


def checkpoints(root: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    steps = {p: p.name.removeprefix(PREFIX) for p in root.glob(f"{PREFIX}*")}
    found = [p for p, step in steps.items() if step.isdecimal() and (p / "state.json").is_file()]
    return sorted(found, key=lambda p: int(steps[p]))


def _by_age(found: list[Path], newest: Path) -> list[Path]:
    """Checkpoints, those first that another run left in the folder: steps that this one has yet to take."""
    ours = found.index(newest) + 1
    return found[ours:] + found[:ours]


def find_checkpoint(requested: bool | str, output_dir: str) -> Path | None:
    """What `train.resume_from_checkpoint` names: None, the latest of the run, or a folder.

    Raises:
        UserError: the named folder is not a checkpoint.
    """
    if requested is False:
        return None
    if requested is True:
        latest = Path(output_dir) / "latest"
        named = (
            Path(output_dir) / latest.read_text(errors="replace").strip()
            if latest.is_file()
            else None
        )
        if named is not None and (named / "state.json").is_file():
            return named
        complete = checkpoints(Path(output_dir))
        return complete[-1] if complete else None
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
    """Restore engine, random state, `metrics` and `stateful` (in place); returns the saved state.

    `fits` names what must be as it was (world size, data, global batch, ...).

    Raises:
        UserError: the checkpoint is of a run that differs in one of `fits`, or is damaged.
    """
    try:
        state = json.loads((folder / "state.json").read_text())
        if not isinstance(state, dict):
            raise ValueError("it holds no object")
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}/state.json cannot be read: {error}") from None
    differing = [name for name, value in fits.items() if state.get(name) != value]
    if differing:
        details = "; ".join(f"{n} was {state.get(n)!r} and is {fits[n]!r}" for n in differing)
        raise UserError(
            f"{folder} cannot be resumed exactly: {details}. Set it back, or start a new run from "
            "this one's weights with another train.output_dir"
        )
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


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """A full disk is told as a UserError; torch raises it as a RuntimeError. A half-written folder goes."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        free = shutil.disk_usage(place.parent).free / 2**20
        if place.name.endswith(".partial"):
            shutil.rmtree(place, ignore_errors=True)
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{place} cannot be written: {reason} ({free:,.0f} MiB are free there). The checkpoints that "
            "are done are whole: make room, and go on with train.resume_from_checkpoint=true"
        ) from error


@contextmanager
def _reading(place: Path) -> Iterator[None]:
    """A torn file makes torch raise nearly anything."""
    try:
        yield
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{place} cannot be read: {reason} The checkpoint is damaged or of another model: name "
            "an earlier one with train.resume_from_checkpoint, or start a new run"
        ) from error


def _random_state() -> dict:
    state = {"cpu": torch.get_rng_state()}
    return state | {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else state


def _flush(folder: Path) -> None:
    """Everything below a folder reaches the disk before the rename that makes it count."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _write_whole(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.partial")
    with aside.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    aside.rename(path)
