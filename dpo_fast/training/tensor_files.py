"""Files of a checkpoint: written with their hash, read as tensors only, copied to be written later.

`EngineFiles` is what DeepSpeed saves and loads its own files with. It takes the place of one that unpickles
whatever a file holds.
"""

from __future__ import annotations

import copy
import hashlib
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from dpo_fast import durable
from dpo_fast.errors import UserError
from dpo_fast.training.manifest import Entry


def write_tree(file: Path, tree: Any) -> Entry:
    """Write tensors in dicts and lists in torch's format, and bring them to the disk. Raises OSError."""
    with file.open("wb", buffering=0) as stream:
        hashing = _Hashing(stream)
        try:
            torch.save(_mapped(_plain, tree), hashing)
        except (
            RuntimeError
        ) as error:  # torch goes on after a failed write, and then tells another reason
            raise hashing.error or error from None
    durable.flush(file)
    return Entry(hashing.size, hashing.digest.hexdigest())


def read_tree(file: Path, map_location: Any = "cpu", mmap: bool = False) -> Any:
    """What `write_tree` wrote. Nothing that a file holds is executed.

    mmap: read from the file only what is used.

    Raises:
        UserError: the file cannot be read, or holds more than tensors, numbers and words.
    """
    try:
        with torch.serialization.safe_globals(_engine_types()):
            return torch.load(file, map_location=map_location, weights_only=True, mmap=mmap)
    except pickle.UnpicklingError:
        raise UserError(
            f"{file} cannot be read: it is damaged, or holds Python objects, which could run code and are "
            "not loaded. dpo_fast writes none; take a checkpoint from where you trust it"
        ) from None
    except Exception as error:  # torch raises nearly anything when it reads a damaged file
        raise UserError(f"{file} cannot be read: {durable.first_line(error)}") from error


class EngineFiles:
    """DeepSpeed's interface to files: what it calls a checkpoint engine.

    writer: gets what is saved; None to load.
    """

    def __init__(self, writer: Writer | None = None) -> None:
        self.writer = writer

    def save(self, state_dict: Any, path: str) -> None:
        self.writer.save(Path(path), state_dict)

    def load(self, path: str, map_location: Any = None) -> Any:
        return read_tree(Path(path), map_location)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        self.writer.attempt(lambda: Path(path).mkdir(parents=True, exist_ok=exist_ok))

    def create(self, info: Any) -> None: ...

    def commit(self, info: Any) -> bool:
        return True

    def cleanup(self) -> None: ...

    def is_decoupled(self) -> bool:
        return False

    def is_data_parallel_writer(self, rank: int) -> bool:
        return rank == 0

    def preserves_storage_sharing(self) -> bool:
        return True


class Writer:
    """Writes the files of one rank to a folder, or keeps copies to write them in `finish`.

    It keeps its first error and raises none, as other ranks are on the way to a collective.

    copies: where tensors lie until they are written; None to write at once.
    entries: of the files that are written, by their path in the folder.
    """

    def __init__(self, folder: Path, copies: HostCopies | None = None) -> None:
        self.folder, self.copies = folder, copies
        self.entries: dict[str, Entry] = {}
        self.error: tuple[Path, Exception] | None = None
        self._waiting: list[tuple[Path, Any]] = []

    def save(self, file: Path, tree: Any) -> None:
        """Write a file, or take a copy of what it shall hold."""
        if self.error is None:
            self.attempt(lambda: self._take(file, tree), file)

    def finish(self) -> None:
        """Write what waits."""
        for file, tree in self._waiting:
            if self.error is None:
                self.attempt(partial(self._write, file, tree), file)
        self._waiting = []

    def attempt(self, work: Callable[[], Any], place: Path | None = None) -> None:
        """Do some of the writing, and keep the first error. place: what it writes."""
        try:
            work()
        except Exception as error:
            self.error = self.error or (place or self.folder / "engine", error)

    def _take(self, file: Path, tree: Any) -> None:
        if self.copies is None:
            self._write(file, tree)
        else:
            name = file.relative_to(self.folder).as_posix()
            self._waiting.append((file, self.copies.take(name, tree)))

    def _write(self, file: Path, tree: Any) -> None:
        self.entries[file.relative_to(self.folder).as_posix()] = write_tree(file, tree)


class HostCopies:
    """Copies of tensors in host memory. One saving after another uses the same memory."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, int], Tensor] = {}

    def take(self, name: str, tree: Any) -> Any:
        """A copy of a tree that the run's next step does not change. name: the same at every saving."""
        taken: dict[tuple, Tensor] = {}  # tied weights are copied once
        number = 0

        def copied(leaf: Any) -> Any:
            nonlocal number
            if not isinstance(leaf, Tensor):
                return copy.deepcopy(leaf)
            leaf = leaf.detach()
            key = (leaf.data_ptr(), leaf.dtype, leaf.device, tuple(leaf.shape), leaf.stride())
            if leaf.numel() == 0 or key not in taken:
                taken[key] = self._copy((name, number), leaf)
                number += 1
            return taken[key]

        found = _mapped(copied, tree)
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        return found

    def _copy(self, place: tuple[str, int], value: Tensor) -> Tensor:
        kept = self._kept.get(place)
        if kept is None or kept.shape != value.shape or kept.dtype != value.dtype:
            kept = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
            self._kept[place] = kept
        return kept.copy_(value, non_blocking=value.is_cuda)


class _Hashing:
    """What torch writes to: passes bytes on to a file and hashes them. torch never goes back in a file."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream, self.digest, self.size = stream, hashlib.sha256(), 0
        self.error: OSError | None = None

    def write(self, data) -> int:
        left = memoryview(data).cast("B")
        self.digest.update(left)
        self.size += len(left)
        try:
            while left:  # a file without a buffer may take less than it is given
                left = left[self.stream.write(left) :]
        except OSError as error:
            self.error = self.error or error
            raise
        return len(data)

    def flush(self) -> None: ...


def _mapped(work: Callable[[Any], Any], tree: Any) -> Any:
    """A tree of the same form. torch would take a shape for a tree of numbers, and make it a tuple."""
    return tree_map(work, tree, is_leaf=lambda node: isinstance(node, torch.Size))


def _plain(leaf: Any) -> Any:
    """A Parameter, or a tensor to which DeepSpeed has attached something, as a tensor."""
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


def _engine_types() -> list:
    """Classes beside tensors in DeepSpeed's files. They hold numbers, and making one does nothing else."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [LossScaler, ZeroStageEnum, fragment_address]
