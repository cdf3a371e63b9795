"""Files and folders that are whole or absent: written aside, flushed, then renamed.

After a crash or a power cut a reader finds the old content or the new one, never a part of either.
One process at a time writes under a name. What a killed one left aside is overwritten by the next.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from dpo_fast.errors import UserError


def aside(path: Path) -> Path:
    """Where a file or folder lies until it has its name: hidden, in the same folder."""
    return path.with_name(f".{path.name}.partial")


def write_file(file: Path, content: str | bytes) -> None:
    """Make or replace a file; text is written as UTF-8.

    Raises:
        OSError: it cannot be written; an old file is as it was.
    """
    partial = aside(file)
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        flush(partial)
        os.replace(partial, file)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
    flush(file.parent)


def publish(finished: Path, target: Path, replace: bool = False) -> None:
    """Flush a finished folder and rename it to `target`, in the same file system.

    replace: an older `target` gives way. It is renamed before it is removed, so it is never half there.
        What a link points to stays.

    Raises:
        OSError: it cannot be flushed or renamed, or `target` has content and is not to be replaced.
    """
    for path in (*finished.rglob("*"), finished):
        flush(path)
    old = target.with_name(f".{target.name}.old")
    if replace:
        _discard(old)
        with contextlib.suppress(FileNotFoundError):
            target.rename(old)
    finished.rename(target)
    flush(target.parent)
    if replace:
        _discard(old)


def _discard(path: Path) -> None:
    """Remove a folder, a file or a link, as far as that goes."""
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def remove(folder: Path) -> None:
    """Remove a folder. It loses its name first, so it is never half there under it."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    folder.rename(old)
    shutil.rmtree(old)


@contextlib.contextmanager
def in_turn(file: Path) -> Iterator[None]:
    """Inside it no other process is inside it for the same file, which is made and removed again.

    The lock is the system's, and ends with its process. Without locks in the file system nothing waits.
    Raises OSError if the file cannot be made.
    """
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(file), os.fstat(descriptor)):
                break
        os.close(descriptor)  # the one before has removed it
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            file.unlink()
        os.close(descriptor)


def flush(path: Path) -> None:
    """Bring the content of a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some network file systems cannot flush a folder
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def writing(
    place: Path, remedy: str, errors: tuple[type[Exception], ...] = (OSError,)
) -> Iterator[None]:
    """Turn a failure to write, such as a full disk, into a UserError with the reason and the free space.

    place: what is written. If it lies aside, it is removed.
    remedy: what is safe, and how to go on.
    errors: what counts as a failure to write.
    """
    try:
        yield
    except errors as error:
        free = shutil.disk_usage(existing(place)).free / 2**20
        if place.name.endswith(".partial"):
            shutil.rmtree(place, ignore_errors=True)
        raise UserError(
            f"{place} cannot be written: {first_line(error)} ({free:,.0f} MiB are free there). {remedy}"
        ) from error


def existing(path: Path) -> Path:
    """The path itself, or the nearest folder above it that exists."""
    return next(each for each in (path, *path.absolute().parents) if os.path.exists(each))


def first_line(error: Exception) -> str:
    """What an error says first, or its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
