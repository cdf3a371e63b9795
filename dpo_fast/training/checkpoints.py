"""Checkpoints that are whole or refused: which there are, which one to go on from, and loading it.

output_dir/checkpoint-40/     engine/        DeepSpeed's shards: weights, optimiser, schedule
                              rank-0.pt      one for each rank: random state, metrics since the last
                                             line, state of a reference that follows the policy
                              state.json     the step, the run, and what a resumed run must share
                              manifest.json  every file with its size and hash
output_dir/latest             name of the newest, written last

`training/saver.py` writes them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor

from dpo_fast import durable
from dpo_fast.errors import LostPeer, UserError
from dpo_fast.training import distributed
from dpo_fast.training.manifest import (
    ADDED,
    NAME,
    DamagedError,
    Manifest,
    differences,
    read_manifest,
    unlisted,
)
from dpo_fast.training.tensor_files import EngineFiles, read_tree

PREFIX, LATEST, STATE = "checkpoint-", "latest", "state.json"
FULL_DISK = (OSError, SafetensorError)
MOST_NAME = 1 << 12  # characters of `latest` that are read
SHOWN = 5  # differences that a message lists


class Stateful(Protocol):
    """A part of a run that has a state, as tensors by name."""

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is one of ours, whole or not. A model folder may have files of the same names."""
    return (folder / "engine").is_dir() and any((folder / name).is_file() for name in (STATE, NAME))


def find_checkpoint(requested: bool | str, output_dir: str) -> Path | None:
    """The checkpoint that `train.resume_from_checkpoint` asks for, whole or not.

    requested: false for none, true for the newest of output_dir if there is one, or a folder.

    Raises:
        UserError: the named folder is not a checkpoint, `latest` names one that is gone, or output_dir
            has checkpoints of another run.
    """
    root = Path(output_dir)
    if requested is False:
        return None
    if requested is True:
        return _newest(root)
    folder = Path(requested)
    if not (folder / STATE).is_file() and not (folder / NAME).is_file():
        raise UserError(
            f"train.resume_from_checkpoint={requested} is not a checkpoint: expected a folder "
            f"{PREFIX}N with {STATE}; to continue the latest of output_dir set it to true"
        )
    run = run_of(folder)
    for other in checkpoints(root):
        if run is not None and run_of(other) not in (run, None):
            raise UserError(
                f"train.output_dir={output_dir} holds {other.name}, which is not of the run of {folder}; "
                "name another folder"
            )
    return folder


def check_whole(folder: Path) -> None:
    """Compare a checkpoint with its manifest. Collective: every rank reads some of the files.

    Raises:
        UserError: it is damaged; names what is wrong and an earlier checkpoint that is whole.
    """
    try:
        manifest = read_manifest(folder)
        _check_step(folder, manifest)
        largest_first = sorted(manifest.files, key=lambda name: -manifest.files[name].size)
        own = largest_first[distributed.rank() :: distributed.world_size()]
        problems = differences(folder, manifest, own)
        if distributed.is_main():
            problems += unlisted(folder, manifest)
    except DamagedError as error:
        problems = [str(error)]
    problems = sorted({clause for each in distributed.gathered(problems) for clause in each})
    if problems:
        raise UserError(distributed.from_main(lambda: _damage(folder, problems)))


def load_checkpoint(
    engine,
    folder: Path,
    fits: dict,
    metrics: dict[str, Tensor],
    stateful: Mapping[str, Stateful] = MappingProxyType({}),
) -> dict:
    """Restore engine, random state, `metrics` and `stateful` in place; returns the content of state.json.

    Nothing that a file holds is executed.

    folder: of a checkpoint that `check_whole` has passed.
    fits: what must be as it was (world size, data, batch size, ...), by its name in state.json.

    Raises:
        UserError: the checkpoint is of a run that differs in one of `fits`, or cannot be read.
    """
    state = fitting_state(folder, fits)
    engine.checkpoint_engine = EngineFiles()
    with reading(folder / "engine"):
        path, _ = engine.load_checkpoint(str(folder), tag="engine")
    if path is None:
        raise UserError(f"{folder}: DeepSpeed finds no checkpoint in its folder engine/")
    file = folder / f"rank-{distributed.rank()}.pt"
    mine = read_tree(file)
    with reading(file):
        metrics |= {name: value.to(engine.device) for name, value in mine["metrics"].items()}
        for name, each in stateful.items():
            each.load_state_dict(mine["own"][name])
        set_random_state(mine["random"])
    return state


def random_state() -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    return state | {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else state


def set_random_state(state: dict[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def checkpoints(root: Path) -> list[Path]:
    """Checkpoints, whole or not, in the order of their steps. Other trainers' folders are none."""
    found = [path for path in root.glob(f"{PREFIX}*") if step_of(path) is not None and _ours(path)]
    return sorted(found, key=step_of)


def step_of(folder: Path) -> int | None:
    """The step in a checkpoint's name; None if it is no such name."""
    step = folder.name.removeprefix(PREFIX)
    return int(step) if folder.name.startswith(PREFIX) and step.isdecimal() else None


def run_of(folder: Path) -> str | None:
    """The run that a checkpoint is of; None where its manifest cannot tell."""
    try:
        return read_manifest(folder).run
    except DamagedError:
        return None


@contextmanager
def still_there(folder: Path | None) -> Iterator[None]:
    """Tell an error while a checkpoint is read as its removal, if a run that goes on has removed it."""
    try:
        yield
    except UserError:
        if folder is None or folder.exists():
            raise
        raise UserError(
            f"{folder} was removed while it was read: its run goes on, and keeps train.save_total_limit "
            "checkpoints. Take a newer one, or copy one first"
        ) from None


@contextmanager
def saving(place: Path) -> Iterator[None]:
    """`durable.writing` for the files of a run.

    A RuntimeError is no failure to write: a lost rank or a GPU out of memory is one, too.
    """
    remedy = (
        "The checkpoints that are done are whole: make room, and go on with "
        "train.resume_from_checkpoint=true"
    )
    with durable.writing(place, remedy, FULL_DISK), distributed.collective_errors():
        yield


def _ours(folder: Path) -> bool:
    """Whether any file of a checkpoint of ours is there. transformers' Trainer has the same names."""
    return any((folder / name).exists() for name in (NAME, STATE, "engine")) or bool(
        next(folder.glob("rank-*.pt"), None)
    )


def _newest(root: Path) -> Path | None:
    """The checkpoint that `latest` names, or else the one of the highest step."""
    found = checkpoints(root)
    with suppress(OSError):
        if not (root / LATEST).is_file():  # opening a pipe would wait for a writer
            return found[-1] if found else None
        with (root / LATEST).open(errors="replace") as file:
            named = root / file.read(MOST_NAME).strip()
        own = named.parent == root
        if own and (named in found or is_checkpoint(named)):
            return named
        if own and step_of(named) is not None:
            raise UserError(_damage(named, ["the folder is gone, and latest names it"]))
    return found[-1] if found else None


def _check_step(folder: Path, manifest: Manifest) -> None:
    if step_of(folder) not in (None, manifest.step):
        raise DamagedError(f"{NAME} is of step {manifest.step}")


def _is_whole(folder: Path) -> bool:
    try:
        manifest = read_manifest(folder)
        _check_step(folder, manifest)
        return not [*unlisted(folder, manifest), *differences(folder, manifest, manifest.files)]
    except DamagedError:
        return False


def _damage(folder: Path, problems: list[str]) -> str:
    """Words about a damaged checkpoint, with one of its run that is whole, an earlier one if there is."""
    shown = "; ".join(problems[:SHOWN])
    more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    if all(problem.endswith(ADDED) for problem in problems):
        return (
            f"{folder} holds what the run did not write: {shown}{more}. Nothing was loaded from it"
        )
    step, run = step_of(folder), run_of(folder)
    others = [p for p in checkpoints(folder.parent) if p != folder and run in (None, run_of(p))]
    others.sort(key=lambda path: (step is None or step_of(path) < step, step_of(path)))
    whole = next(filter(_is_whole, reversed(others)), None)
    remedy = (
        "no other checkpoint is whole: begin again with train.overwrite_output_dir=true or in another "
        "folder"
        if whole is None
        else f"{whole.name} is whole: take {whole}, to go on as train.resume_from_checkpoint={whole}"
    )
    return f"{folder} is damaged: {shown}{more}. Nothing was loaded from it; {remedy}"


def read_state(folder: Path) -> dict[str, Any]:
    """The content of state.json. Raises UserError if it cannot be read."""
    try:
        state = json.loads((folder / STATE).read_text())
        if not isinstance(state, dict):
            raise ValueError("it holds no object")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{folder}/{STATE} cannot be read: {error}") from None
    return state


def fitting_state(folder: Path, fits: dict) -> dict[str, Any]:
    """The content of state.json. Raises UserError if it cannot be read, or differs from `fits`."""
    state = read_state(folder)
    differing = [name for name in fits if name in state and state[name] != fits[name]]
    if differing:
        details = "; ".join(f"{n} was {state[n]!r} and is {fits[n]!r}" for n in differing)
        rate = "train.learning_rate"
        asked = ", set train.change_on_resume=[learning_rate]" if differing == [rate] else ""
        if differing == ["data"]:
            asked = " (train.skip_rows leaves rows out and keeps all others where they are)"
        raise UserError(
            f"{folder} cannot be resumed exactly: {details}. Set it back{asked}, or start a new run from "
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
def reading(place: Path) -> Iterator[None]:
    """Tell what does not fit as a UserError. torch raises nearly anything when it loads a state."""
    try:
        with distributed.collective_errors():
            yield
    except (LostPeer, UserError):
        raise
    except Exception as error:
        raise UserError(
            f"{place} cannot be read: {durable.first_line(error)} The checkpoint is of another model, or "
            "was altered: name another one with train.resume_from_checkpoint, or start a new run"
        ) from error
