"""Checkpoints on their way to the hub while a run goes on (`train.hub_strategy`).

A thread of rank 0 uploads them, and the run never waits for it before its end. A checkpoint stays on the
disk until it is uploaded, whatever `train.save_total_limit` says.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from dpo_fast.durable import first_line
from dpo_fast.errors import UserError
from dpo_fast.training import distributed
from dpo_fast.training.checkpoints import PREFIX
from dpo_fast.training.config import RunConfig
from dpo_fast.training.console import say
from dpo_fast.training.hub import push, push_checkpoint, repo_of
from dpo_fast.training.saver import Saver
from dpo_fast.training.sections import AT_THE_END

LAST = "last-checkpoint"  # as transformers calls it
HURRY = 15.0  # seconds that a push has once the run is stopped


class Pushes:
    """Pushes one checkpoint after the other. All but one that is being pushed give way to a newer one.

    everything: none gives way.
    """

    def __init__(self, push_one: Callable[[Path], None], everything: bool) -> None:
        self._push, self._everything = push_one, everything
        self._waiting: list[Path] = []
        self._now: Path | None = None
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def add(self, checkpoint: Path) -> None:
        """Push this one as soon as the one before is done."""
        with self._changed:
            if not self._everything:
                self._waiting.clear()
            self._waiting.append(checkpoint)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="push", daemon=True)
                self._thread.start()

    def held(self) -> set[str]:
        """Names of the checkpoints that are not pushed yet."""
        with self._changed:
            return {each.name for each in (self._now, *self._waiting) if each is not None}

    def finish(self, patience: float | None) -> set[str]:
        """Wait so many seconds, or as long as it takes; returns what is not pushed then."""
        with self._changed:
            self._changed.wait_for(lambda: self._thread is None, patience)
        return self.held()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._now = self._waiting.pop(0) if self._waiting else None
                if self._now is None:
                    self._thread = None
                    self._changed.notify_all()
                    return
            try:
                self._push(self._now)
            except UserError as error:
                say(f"{error}. The run goes on", matters=True)
            except Exception as error:  # of a client; a run that ends would wait for this thread
                kind = type(error).__name__
                say(
                    f"{self._now} is not pushed: {kind}: {first_line(error)} Push it with `dpo-fast push "
                    f"{self._now}`. The run goes on",
                    matters=True,
                )


@contextmanager
def pushing(config: RunConfig, saver: Saver) -> Iterator[None]:
    """Inside, checkpoints are pushed as `train.hub_strategy` says. Ends when all of them are."""
    train = config.train
    if not train.push_to_hub or train.hub_strategy == AT_THE_END or not distributed.is_main():
        yield
        return
    pushes = Pushes(partial(push_save, config), train.hub_strategy == "all_checkpoints")
    saver.published, saver.held = pushes.add, pushes.held
    try:
        yield
    except BaseException:
        if left := pushes.finish(HURRY):
            say(f"{', '.join(sorted(left))}: not pushed to {repo_of(config)}", matters=True)
        raise
    if waits := pushes.held():
        say(f"waiting until {', '.join(sorted(waits))} is pushed to {repo_of(config)}")
    pushes.finish(None)
    saver.remove_old()


def push_save(config: RunConfig, checkpoint: Path) -> None:
    """Push the model of a checkpoint, and where it is asked for the checkpoint. Raises UserError."""
    train, repo = config.train, repo_of(config)
    message = f"Training in progress, step {checkpoint.name.removeprefix(PREFIX)}"
    where = (repo, train.hub_private_repo, train.hub_revision)
    push(checkpoint, *where, message)
    if train.hub_strategy != "every_save":
        inside = LAST if train.hub_strategy == "checkpoint" else checkpoint.name
        push_checkpoint(checkpoint, inside, *where, f"{message}, checkpoint")
