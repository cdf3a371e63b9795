"""Saving a run: at once, or beside it (`train.async_save`).

A checkpoint is written aside. It gets its name when the files of all ranks and the manifest are on the
disk.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
import uuid
from collections.abc import Callable, Collection, Mapping
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType

import torch.distributed as dist
from torch import Tensor

from dpo_fast import durable
from dpo_fast.errors import Interrupted, UserError
from dpo_fast.training import distributed
from dpo_fast.training.checkpoints import (
    FULL_DISK,
    LATEST,
    PREFIX,
    STATE,
    Stateful,
    checkpoints,
    random_state,
    saving,
)
from dpo_fast.training.config import RunConfig
from dpo_fast.training.manifest import Entry, Manifest, hash_file, write_manifest
from dpo_fast.training.tensor_files import EngineFiles, HostCopies, Writer


class Saver:
    """Writes the checkpoints of a run. Every rank has one, and all call the same methods in turn.

    output_dir: their folder.
    keep: so many stay (None: all), the newest and `best`, the name of one, if there is.
    beside: write while the run goes on. It takes as much host memory as a rank writes.
    timeout: how long ranks wait for each other's files if they are written beside the run.
    published: is called on rank 0 with every checkpoint that has its name.
    held: names of checkpoints that somebody reads, which are not removed yet.
    run: identity of the run; one that goes on keeps that of its checkpoint.
    """

    def __init__(
        self,
        output_dir: str,
        keep: int | None,
        beside: bool = False,
        timeout: timedelta = timedelta(minutes=30),
    ) -> None:
        self.root, self.keep = Path(output_dir), keep
        self.best: str | None = None
        self._newest: Path | None = None
        self.published: Callable[[Path], None] = lambda checkpoint: None
        self.held: Callable[[], Collection[str]] = tuple
        self.run = distributed.from_main(lambda: uuid.uuid4().hex)
        self._copies = HostCopies() if beside else None
        self._pending: Background | None = None
        # Threads need a group of their own: collectives of one group must come in the same order.
        shared = beside and distributed.world_size() > 1
        self._group = dist.new_group(backend="gloo", timeout=timeout) if shared else None

    @classmethod
    def of(cls, config: RunConfig) -> Saver:
        """The saver of a run. Collective."""
        train, timeout = config.train, timedelta(minutes=config.parallel.timeout_minutes)
        return cls(train.output_dir, train.save_total_limit, train.async_save, timeout)

    def save(
        self,
        engine,
        state: dict,
        metrics: dict[str, Tensor],
        stateful: Mapping[str, Stateful] = MappingProxyType({}),
        write_more: Callable[[Path], None] = lambda folder: None,
        named: Callable[[], None] = lambda: None,
    ) -> Path:
        """Save a run as it is now. Waits for the checkpoint before this one. Collective.

        state: for state.json; holds at least `step`.
        metrics: sums of the open window.
        stateful: parts of the run that change with it.
        write_more: writes further files into the folder, which the manifest covers. Collective.
        named: is called on rank 0 when the checkpoint has its name, before older ones are removed.

        Returns:
            The folder that the checkpoint has, or will have when `wait` returns.

        Raises:
            UserError: it, or the one before, cannot be written; older ones are whole.
        """
        self.wait()
        final = self.root / f"{PREFIX}{state['step']}"
        aside = durable.aside(final)
        distributed.from_main(lambda: self._make(aside))
        writer = Writer(aside, self._copies)
        engine.checkpoint_engine = EngineFiles(writer)
        with scripts_copied_by(writer, engine):
            engine.save_checkpoint(str(aside), tag="engine", save_latest=False)
        own = {name: each.state_dict() for name, each in stateful.items()}
        mine = {"random": random_state(), "metrics": metrics, "own": own}
        writer.save(aside / f"rank-{distributed.rank()}.pt", mine)
        writer.attempt(lambda: write_more(aside))
        content = json.dumps(state | {"run": self.run}, indent=2)
        if self._copies is None:
            self._finish(writer, final, content, named)
        else:
            self._pending = Background(lambda: self._finish(writer, final, content, named))
        return final

    def check(self) -> None:
        """Raise what went wrong with a checkpoint that is written beside the run.

        Collective while one is. Ranks end their files at different times, so they agree on the step.
        """
        if self._pending and not distributed.any_rank(not self._pending.ended()):
            self.wait()

    def wait(self) -> None:
        """Until the last checkpoint is whole. Raises UserError if it cannot be written."""
        pending, self._pending = self._pending, None
        if pending:
            pending.wait()

    def goes_on_from(self, checkpoint: Path, state: dict) -> None:
        """The run of this checkpoint is resumed: it is the latest from now on, if it lies in output_dir."""
        self.run = state["run"]
        if distributed.is_main() and checkpoint.resolve().parent == self.root.resolve():
            with saving(self.root / LATEST):
                durable.write_file(self.root / LATEST, checkpoint.name)

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        if kind is None or issubclass(kind, Interrupted):
            self.wait()
        elif not issubclass(kind, KeyboardInterrupt):  # who presses twice does not want to wait
            with contextlib.suppress(Exception):  # the first error is the one to tell
                self.wait()

    def _make(self, aside: Path) -> None:
        """An empty folder, and none that a killed run left."""
        with saving(aside):
            for left in self.root.glob(f".{PREFIX}*"):
                shutil.rmtree(left, ignore_errors=True)
            aside.mkdir(parents=True)

    def _finish(self, writer: Writer, final: Path, content: str, named: Callable[[], None]) -> None:
        """Bring the files to the disk and give the checkpoint its name. Collective, in one thread of each.

        Every rank raises the same UserError, and one that failed for another reason that one.
        """
        writer.finish()
        outcomes = distributed.gathered((writer.entries, _told(writer)), self._group)
        problem = next((text for _, text in outcomes if text), None)
        if problem is None and distributed.is_main():
            entries = {name: entry for own, _ in outcomes for name, entry in own.items()}
            writer.attempt(lambda: self._publish(final, content, entries, named), final)
            problem = _told(writer)
        problem = distributed.gathered(problem, self._group)[0]
        if problem:
            if distributed.is_main():
                shutil.rmtree(writer.folder, ignore_errors=True)
            if writer.error and not isinstance(writer.error[1], FULL_DISK):
                raise writer.error[1]
            raise UserError(problem)

    def _publish(
        self, final: Path, content: str, entries: dict[str, Entry], named: Callable[[], None]
    ) -> None:
        aside = durable.aside(final)
        durable.write_file(aside / STATE, content)
        for path in aside.rglob("*"):  # state.json, and what was written by others
            name = path.relative_to(aside).as_posix()
            if path.is_file() and name not in entries:
                entries[name] = hash_file(path)
        write_manifest(aside, Manifest(self.run, json.loads(content)["step"], entries))
        durable.publish(aside, final, replace=True)
        durable.write_file(self.root / LATEST, final.name)
        named()
        self._newest = final
        self.published(final)
        self.remove_old()

    def remove_old(self) -> None:
        """Remove what is beyond `keep`, but for what is held. Rank 0 calls."""
        newest = self._newest
        if newest is None:
            return
        others = [p for p in by_age(checkpoints(self.root), newest)[:-1] if p.name != self.best]
        both = self.best not in (None, newest.name)  # then the best is one of those that stay
        too_many = 0 if self.keep is None else max(len(others) - self.keep + 1 + both, 0)
        held = self.held()
        for old in others[:too_many]:
            if old.name not in held:
                durable.remove(old)


class Background:
    """Work in a thread."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=[work], name="save", daemon=True)
        self._thread.start()

    def ended(self) -> bool:
        return not self._thread.is_alive()

    def wait(self) -> None:
        """Until the work is done. Raises what it has raised."""
        self._thread.join()
        if self._error:
            raise self._error

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self._error = error


def by_age(found: list[Path], newest: Path) -> list[Path]:
    """Oldest first. Steps beyond the newest are left of an earlier, longer run in the folder."""
    ours = found.index(newest) + 1
    return found[ours:] + found[:ours]


@contextlib.contextmanager
def scripts_copied_by(writer: Writer, engine):
    """DeepSpeed's own conversion scripts, copied such that a full disk is told to all ranks."""
    copy = getattr(engine, "_copy_recovery_script", None)
    engine._copy_recovery_script = lambda folder: writer.attempt(lambda: copy(folder))
    try:
        yield
    finally:
        del engine._copy_recovery_script


def _told(writer: Writer) -> str | None:
    """The error of a writer in words."""
    if writer.error is None:
        return None
    place, error = writer.error
    try:
        with saving(place):
            raise error
    except UserError as told:
        return str(told)
    except Exception:
        reason = f"{type(error).__name__}: {durable.first_line(error)}"
        return f"rank {distributed.rank()} could not save: {reason}"
