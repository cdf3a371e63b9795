"""A stored reference on disk: a folder of Parquet parts and a manifest. It is complete or absent.

train/_manifest.json        model, dtype and data that it was computed with, and a sha256 of every part
train/part-00000.parquet    a row for each example, in the order of the data:

    digest                                  hash of the token ids
    where                                   file and line of the data
    chosen_logps, rejected_logps            summed log-probs, fp32
    chosen_tokens, rejected_tokens          scored tokens, int32
    chosen_token_logps, ...                 lists of fp32, with reference.per_token

The columns are named after the answers: `completion_logps` and so on for unpaired data; `completions_logps`
and so on for groups, as lists. `pandas.read_parquet(folder)` reads the folder as one table and passes over
the manifest.

While it is computed the finished parts gather in `.train.partial`, which is renamed when it has them all.
An interrupted computation goes on after the parts that are there.
"""

from __future__ import annotations

import datetime
import fcntl
import hashlib
import io
import json
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from dpo_fast import durable
from dpo_fast.data.dataset import Dataset
from dpo_fast.data.kinds import Kind
from dpo_fast.errors import UserError

FORMAT = 2
MANIFEST = "_manifest.json"
LOCK = ".lock"
ROWS_PER_PART = 2048  # at most so many are lost when a process is killed
REMEDY = "delete the folder to compute it again, or name another with reference.cache_dir"


def _a_second() -> None:
    time.sleep(1.0)


def names_of(kind: Kind, what: str) -> list[str]:
    """The column of each answer. what: `logps`, `tokens` or `token_logps`."""
    return [f"{answer}_{what}" for answer in kind.answers]


def part_name(index: int) -> str:
    return f"part-{index:05d}.parquet"


def read_manifest(folder: Path) -> dict[str, Any]:
    """A folder's manifest. Raises UserError if there is none, or it cannot be read."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if not isinstance(manifest, dict):
            raise ValueError(f"{MANIFEST} holds no object")
    except (OSError, ValueError) as error:
        raise UserError(f"reference {folder} cannot be read ({error}); {REMEDY}") from None
    return manifest


def differences(stored: dict, wanted: dict) -> str:
    """In which values a manifest differs from those that are wanted, in words; empty if in none."""
    return "; ".join(
        f"{name} is {stored.get(name)!r} there and {value!r} here"
        for name, value in wanted.items()
        if stored.get(name) != value
    )


def read_columns(folder: Path, columns: list[str]) -> pyarrow.Table:
    """These columns of all parts, in order.

    Each part is read once: the bytes whose sha256 is checked are those that are decoded.

    Raises:
        UserError: a part is missing, or its sha256 is not the one that was written.
    """
    parts = read_manifest(folder).get("parts")
    if not parts:
        raise UserError(f"reference {folder} cannot be read ({MANIFEST} names no parts); {REMEDY}")
    tables = []
    for name, digest in parts.items():
        try:
            content = (folder / name).read_bytes()
        except OSError as error:
            raise UserError(f"reference {folder} cannot be read ({error}); {REMEDY}") from None
        if hashlib.sha256(content).hexdigest() != digest:
            raise UserError(f"reference {folder} is damaged: {name} changed; {REMEDY}")
        tables.append(pyarrow.parquet.read_table(io.BytesIO(content), columns=columns))
    return pyarrow.concat_tables(tables)


def part_rows(rows: int, rows_per_part: int) -> list[range]:
    """Rows of each part."""
    starts = range(0, rows, rows_per_part)
    return [range(start, min(start + rows_per_part, rows)) for start in starts]


class Unfinished:
    """The folder of a reference that is being computed. Only rank 0 opens it.

    final: the folder that it becomes.
    manifest: what it is computed with; a folder that was begun with another manifest is refused.
    examples: the rows, in order.
    """

    def __init__(self, final: Path, manifest: dict, examples: Dataset) -> None:
        self.final, self.examples = final, examples
        self.folder = durable.aside(final)
        self.manifest = manifest | {"rows_per_part": ROWS_PER_PART}
        self.parts = part_rows(len(examples), ROWS_PER_PART)
        self._lock: int | None = None

    def begin(self, wait: Callable[[], None] = _a_second) -> list[int] | None:
        """Make the folder, or go on with it. Returns the indices of the parts that are missing.

        None if another process has computed it by now. While one does so, `wait` is called again and
        again; if that one dies, this one goes on with its parts.

        Raises:
            UserError: it was begun for something else, or cannot be written.
        """
        with self._writing():
            while not self._take_lock():
                self._check_manifest()
                wait()
            if self.final.exists():
                with suppress(OSError):  # they were made a moment ago
                    (self.folder / LOCK).unlink()
                    self.folder.rmdir()
                self.close()
                return None
            if not self._check_manifest():
                content = json.dumps(self.manifest, indent=2)
                durable.write_file(self.folder / MANIFEST, content)
        return [index for index in range(len(self.parts)) if not self._is_done(index)]

    def _check_manifest(self) -> bool:
        """Whether there is one. Raises UserError if it is of something else."""
        try:
            difference = differences(read_manifest(self.folder), self.manifest)
        except UserError:
            if not (self.folder / MANIFEST).exists():  # or not any longer
                return False
            raise
        if difference:
            raise UserError(
                f"{self.folder} was begun for something else: {difference}. Delete it to begin anew, or "
                "name another folder with reference.cache_dir"
            )
        return True

    def write(self, index: int, table: pyarrow.Table) -> None:
        """Add a part. Raises UserError if it cannot be written; the finished parts stay."""
        content = io.BytesIO()
        pyarrow.parquet.write_table(table, content, write_page_checksum=True)
        with self._writing():
            durable.write_file(self.folder / part_name(index), content.getvalue())

    def finish(self, information: dict) -> None:
        """Complete the manifest and give the folder its name. All parts must be there.

        information: what else the manifest records.
        """
        names = [part_name(index) for index in range(len(self.parts))]
        with self._writing():
            digests = {n: hashlib.sha256((self.folder / n).read_bytes()).hexdigest() for n in names}
            created = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
            whole = self.manifest | information | {"created": created, "parts": digests}
            durable.write_file(self.folder / MANIFEST, json.dumps(whole, indent=2))
            durable.publish(self.folder, self.final)
        # Not before it is published: another process would lock a new file, and go on here.
        with suppress(OSError):
            (self.final / LOCK).unlink()
        self.close()

    def close(self) -> None:
        """Release the lock, so that another process may go on."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @property
    def is_open(self) -> bool:
        """Whether this process has begun it, and has neither finished it nor given it up."""
        return self._lock is not None

    def _take_lock(self) -> bool:
        """Lock a file in the folder, which is made. The system releases it when the process ends.

        False if another process has it, or has just renamed the folder. NFS locks no folder, and no file
        that is not open for writing.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / LOCK
        try:
            self._lock = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # it has just been renamed
            return False
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            return False
        except OSError:
            pass  # a file system without locks
        with suppress(OSError):
            if os.path.samestat(os.stat(file), os.fstat(self._lock)):
                return True
        self.close()
        return False

    def _is_done(self, index: int) -> bool:
        """Whether a part is there, holds the rows that it should, and has whole pages."""
        rows = self.parts[index]
        with suppress(OSError, pyarrow.ArrowException):
            table = pyarrow.parquet.read_table(
                self.folder / part_name(index), page_checksum_verification=True
            )
            return table["digest"].combine_chunks() == self.examples.digests.slice(
                rows.start, len(rows)
            )
        return False

    def _writing(self) -> AbstractContextManager[None]:
        remedy = (
            "The parts that are done are kept: make room, and the same command goes on after them"
        )
        return durable.writing(self.final, remedy)
