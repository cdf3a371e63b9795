"""One run at a time in an output folder.

The lock is the system's, on a file of the folder: it ends with its process, however that ends. On NFS the
server keeps it, so it holds between hosts. A file system that has no locks is told.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from dpo_fast.errors import UserError
from dpo_fast.training import distributed
from dpo_fast.training.console import say

NAME = ".lock"
MOMENT = 2.0  # seconds


@contextlib.contextmanager
def sole_run(output_dir: str, option: str = "train.output_dir") -> Iterator[None]:
    """Inside it no other run uses the folder, which is made if it is not there. Collective.

    option: the key that names the folder, for an error.

    Raises:
        UserError: another run uses it, or it cannot be made.
    """
    root = Path(output_dir)
    held: list[int] = []
    new = not root.exists()
    distributed.from_main(lambda: held.append(_take(root, option)))
    try:
        yield
    finally:
        for descriptor in held:
            _release(root, descriptor, new)


def check_free(output_dir: str) -> None:
    """Raises UserError if another run uses the folder now. Locks nothing."""
    with contextlib.suppress(OSError):  # no such file, or one that `sole_run` will tell
        descriptor = os.open(Path(output_dir) / NAME, os.O_RDWR)
        if distributed.is_main() and not _locked_soon(descriptor):
            raise UserError(_taken(Path(output_dir), descriptor, "train.output_dir"))
        os.close(descriptor)


def _take(root: Path, option: str) -> int:
    """Lock the folder and write who has it. Returns the descriptor that holds the lock."""
    file = root / NAME
    while True:
        try:
            root.mkdir(parents=True, exist_ok=True)
            # No lock of flock: a worker that is forked off would hold it after the run's own end.
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise UserError(
                f"{option}={root} cannot be written: {error.strerror or error}; name another folder"
            ) from None
        try:
            if not _locked_soon(descriptor):
                raise UserError(_taken(root, descriptor, option)) from None
        except OSError as error:
            say(
                f"{root} is on a file system without locks ({error.strerror}): another run in it at the "
                "same time would not be noticed",
                matters=True,
            )
        if _is_there(file, descriptor):
            break
        os.close(descriptor)  # the run before removed it between our two calls
    with contextlib.suppress(OSError):  # a full disk: the lock holds, nameless
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(_me()).encode(), 0)
    return descriptor


def _locked_soon(descriptor: int) -> bool:
    """Whether this process has the lock after a moment. Raises OSError if there are no locks.

    A run that only looks has it as briefly, and one that was killed until the system has cleared it away.
    """
    for _ in range(round(MOMENT / 0.05)):
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except (BlockingIOError, PermissionError):
            time.sleep(0.05)
    return False


def _release(root: Path, descriptor: int, new: bool) -> None:
    """Remove the file, and a new folder that nothing was written to."""
    with contextlib.suppress(OSError):
        (root / NAME).unlink()
        if new:
            root.rmdir()
    os.close(descriptor)


def _is_there(file: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(file), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _me() -> dict:
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": now}


def _taken(root: Path, descriptor: int, option: str) -> str:
    """The error for a folder that another run has."""
    try:
        who = json.loads(os.pread(descriptor, 4096, 0))
        run = "process {pid} on {host}, since {since}".format(**who)
    except (ValueError, LookupError, TypeError, OSError):
        run = "it has not written which"
    os.close(descriptor)
    return (
        f"{option}={root} is in use by another run ({run}): wait until it has ended, end it, or "
        "name another folder"
    )
