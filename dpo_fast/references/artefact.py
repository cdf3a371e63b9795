"""A stored reference on disk: a folder of Parquet parts and a manifest, which grows part by part.

train/_manifest.json        model, dtype and data that it is computed with, and a sha256 of every part
train/part-00000.parquet    a row for each example that has been scored:

    digest                                  hash of the token ids
    where                                   file and line of the data
    chosen_logps, rejected_logps            summed log-probs, fp32
    chosen_tokens, rejected_tokens          scored tokens, int32
    chosen_token_logps, ...                 lists of fp32, with reference.per_token

The columns are named after the answers: `completion_logps` and so on for unpaired data; `completions_logps`
and so on for groups, as lists. `pandas.read_parquet(folder)` reads the folder as one table and passes over
the manifest.

A part counts once the manifest names it. So the folder may be read at any time, a process that is killed
loses the part that it was at, and a longer run adds the rows that a shorter one did not ask for.
"""

from __future__ import annotations

import datetime
import fcntl
import hashlib
import io
import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from dpo_fast import durable
from dpo_fast.data.kinds import Kind
from dpo_fast.errors import UserError

FORMAT = 2
MANIFEST = "_manifest.json"
LOCK = ".lock"
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
        UserError: there is no part yet, one is missing, or its sha256 is not the one that was written.
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


class Growing:
    """The folder of a reference while rows are added to it. One process at a time has it open.

    folder: the reference's.
    manifest: what it is computed with; a folder that was begun with another manifest is refused.
    facts: what a new manifest records beside.
    """

    def __init__(self, folder: Path, manifest: dict, facts: dict | None = None) -> None:
        self.folder, self.manifest, self.facts = folder, manifest, facts or {}
        self.information: dict[str, Any] = {}
        self._lock: int | None = None

    def begin(self, information: dict | None = None, wait: Callable[[], None] = _a_second) -> None:
        """Make the folder, or go on with it. While another process has it, `wait` is called repeatedly.

        information: what the manifest records of how the coming parts are computed.

        Raises:
            UserError: it was begun for something else, or cannot be written.
        """
        created = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        self.information = {"created": created, **(information or {})}
        with self._writing():
            if not self.folder.exists():
                self._make()
            self._check_manifest()
            while not self._take_lock():
                wait()

    def add(self, table: pyarrow.Table) -> None:
        """Add a part. Raises UserError if it cannot be written; those before it stay."""
        content = io.BytesIO()
        pyarrow.parquet.write_table(table, content, write_page_checksum=True)
        manifest = read_manifest(self.folder)
        parts, computed = manifest["parts"], manifest.setdefault("computed", [])
        name = part_name(len(parts))
        if not computed or _untimed(computed[-1]) != _untimed(self.information):
            computed.append({"first_part": name, **self.information})
        parts[name] = hashlib.sha256(content.getvalue()).hexdigest()
        with self._writing():
            durable.write_file(self.folder / name, content.getvalue())
            durable.write_file(self.folder / MANIFEST, json.dumps(manifest, indent=2))

    def close(self) -> None:
        """Let another process go on."""
        if self._lock is not None:
            with suppress(OSError):
                (self.folder / LOCK).unlink()
            os.close(self._lock)
            self._lock = None

    def _make(self) -> None:
        """The folder has its manifest from the beginning: it is made aside and renamed.

        Another process may do the same at the same time, with the same content.
        """
        made = self.folder.with_name(f".{self.folder.name}.new")
        try:
            made.mkdir(parents=True, exist_ok=True)
            whole = self.manifest | self.facts | {"computed": [], "parts": {}}
            durable.write_file(made / MANIFEST, json.dumps(whole, indent=2))
            durable.publish(made, self.folder)
        except OSError:
            shutil.rmtree(made, ignore_errors=True)
            if not self.folder.exists():  # another process has just made it
                raise

    def _check_manifest(self) -> None:
        """Raises UserError if the folder is of something else."""
        difference = differences(read_manifest(self.folder), self.manifest)
        if difference:
            raise UserError(
                f"{self.folder} was begun for something else: {difference}. Delete it to begin anew, or "
                "name another folder with reference.cache_dir"
            )

    def _take_lock(self) -> bool:
        """Lock a file in the folder. The system releases it when the process ends.

        False if another process has it, or has just removed the file. NFS locks no folder, and no file
        that is not open for writing.
        """
        file = self.folder / LOCK
        self._lock = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._forget_lock()
            return False
        except OSError:
            pass  # a file system without locks
        with suppress(OSError):
            if os.path.samestat(os.stat(file), os.fstat(self._lock)):
                return True
        self._forget_lock()
        return False

    def _forget_lock(self) -> None:
        os.close(self._lock)
        self._lock = None

    def _writing(self) -> AbstractContextManager[None]:
        remedy = (
            "The parts that are done are kept: make room, and the same command goes on after them"
        )
        return durable.writing(self.folder, remedy)


def _untimed(information: dict) -> dict:
    """What was recorded of how parts are computed, but for the time."""
    return {n: value for n, value in information.items() if n not in ("created", "first_part")}
