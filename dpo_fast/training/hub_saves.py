"""Checkpoints on their way to the hub while a run goes on (`train.hub_strategy`).

A thread of rank 0 uploads them, and the run never waits for it before its end. A checkpoint stays on the
disk until it is uploaded, whatever `train.save_total_limit` says.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from dpo_fast.durable import first_line
from dpo_fast.errors import UserError
from dpo_fast.progress import duration
from dpo_fast.training import distributed
from dpo_fast.training.checkpoints import PREFIX
from dpo_fast.training.config import RunConfig
from dpo_fast.training.console import say
from dpo_fast.training.hub import again, again_inside, push, push_checkpoint, repo_of
from dpo_fast.training.saver import Saver
from dpo_fast.training.sections import AT_THE_END

LAST = "last-checkpoint"  # as transformers calls it
HURRY = 15.0  # seconds that a push has once the run is stopped
FIRST_WORD, LAST_WORD = 15.0, 600.0  # seconds between lines of a wait, which grow


class Pushes:
    """Pushes one checkpoint after the other. All but one that is being pushed give way to a newer one.

    everything: none gives way, and what has failed is tried again with the next.
    """

    def __init__(self, push_one: Callable[[Path], None], everything: bool) -> None:
        self._push, self._everything = push_one, everything
        self._waiting: list[Path] = []
        self._failed: list[Path] = []
        self._now: Path | None = None
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def add(self, checkpoint: Path) -> None:
        """Push this one as soon as the one before is done."""
        with self._changed:
            again, self._failed = self._failed, []
            self._waiting = [*again, *self._waiting] if self._everything else []
            self._waiting.append(checkpoint)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="push", daemon=True)
                self._thread.start()

    def left(self) -> list[Path]:
        """The checkpoints that are not pushed, failed ones among them, without those that gave way."""
        with self._changed:
            found = (*self._failed, self._now, *self._waiting)
            return list(dict.fromkeys(each for each in found if each is not None))

    def held(self) -> set[str]:
        """Names of the checkpoints that are still to be pushed."""
        with self._changed:
            failed = self._failed if self._everything else []
            return {each.name for each in (*failed, self._now, *self._waiting) if each is not None}

    def ended(self, patience: float) -> bool:
        """Wait until all have been tried, at most so many seconds; returns whether they have."""
        with self._changed:
            return self._changed.wait_for(lambda: self._thread is None, patience)

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
            except (
                Exception
            ) as error:  # of a client, too; a run that ends would wait for this thread
                with self._changed:
                    self._failed.append(self._now)
                told = str(error)
                if not isinstance(error, UserError):
                    told = (
                        f"{self._now} was not pushed: {type(error).__name__}: {first_line(error)}"
                    )
                say(f"{told.rstrip('.')}. The run goes on", matters=True)


@contextmanager
def pushing(config: RunConfig, saver: Saver) -> Iterator[None]:
    """Inside, checkpoints are pushed as `train.hub_strategy` says. Ends when all have been. Collective."""
    train = config.train
    if not train.push_to_hub or train.hub_strategy == AT_THE_END:
        yield
        return
    pushes = Pushes(partial(push_save, config), train.hub_strategy == "all_checkpoints")
    if distributed.is_main():
        saver.published, saver.held = pushes.add, pushes.held
    try:
        try:
            yield
        except BaseException:
            pushes.ended(HURRY)
            raise
        if distributed.is_main():
            _await(pushes, repo_of(config))
    finally:
        for checkpoint in pushes.left():
            told = " and ".join(f"`{each}`" for each in commands(config, checkpoint))
            say(f"{checkpoint.name} is not on the hub: push it with {told}", matters=True)
    distributed.await_all("pushes")  # however long it took: no collective would wait so long
    if distributed.is_main():
        saver.remove_old()


def _await(pushes: Pushes, repo: str) -> None:
    """Wait until all have been tried. A hub that falls silent ends each of them (`hub.SILENCE`)."""
    began, told = time.monotonic(), 0.0
    while not pushes.ended(told):
        names = ", ".join(sorted(pushes.held()))
        since = f", for {duration(time.monotonic() - began)} now" if told else ""
        say(f"waiting for uploads to {repo}{since}: {names}. Ctrl-C ends the wait", matters=True)
        told = min(max(2 * told, FIRST_WORD), LAST_WORD)


def commands(config: RunConfig, checkpoint: Path) -> list[str]:
    """The commands that push what `push_save` does."""
    train, repo = config.train, repo_of(config)
    where = (train.hub_private_repo, train.hub_revision)
    model = again(checkpoint, repo, *where)
    inside = _inside(config, checkpoint)
    return [model] if inside is None else [model, again_inside(checkpoint, inside, repo, *where)]


def push_save(config: RunConfig, checkpoint: Path) -> None:
    """Push the model of a checkpoint, and where it is asked for the checkpoint. Raises UserError."""
    train, repo = config.train, repo_of(config)
    message = f"Training in progress, step {checkpoint.name.removeprefix(PREFIX)}"
    where = (repo, train.hub_private_repo, train.hub_revision)
    push(checkpoint, *where, message)
    if (inside := _inside(config, checkpoint)) is not None:
        push_checkpoint(checkpoint, inside, *where, f"{message}, checkpoint")


def _inside(config: RunConfig, checkpoint: Path) -> str | None:
    """The folder of a repository that a whole checkpoint goes to; None: the model alone is pushed."""
    folders = {"checkpoint": LAST, "all_checkpoints": checkpoint.name}
    return folders.get(config.train.hub_strategy)
