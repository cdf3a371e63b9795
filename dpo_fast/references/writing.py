"""An artefact while it is computed, so that what is interrupted goes on where it was.

The examples of a data set are cut into parts of a fixed number, in order. Finished parts gather in
`.NAME.partial`, which is renamed to NAME when it has them all.
"""

from __future__ import annotations

import datetime
import fcntl
import hashlib
import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pyarrow
import pyarrow.parquet

from dpo_fast.data.dataset import Dataset
from dpo_fast.errors import UserError
from dpo_fast.references.artefact import (
    MANIFEST,
    differences,
    flush_folder,
    part_name,
    read_manifest,
    write_durably,
)

ROWS_PER_PART = 2048  # what is lost at most when a process is killed


def part_rows(rows: int, rows_per_part: int) -> list[range]:
    """Rows of each part."""
    starts = range(0, rows, rows_per_part)
    return [range(start, min(start + rows_per_part, rows)) for start in starts]


class Unfinished:
    """The working folder of an artefact that is being computed. Rank 0 alone has one.

    manifest: what the artefact is made of; a folder that was begun with another is refused.
    """

    def __init__(self, final: Path, manifest: dict, examples: Dataset) -> None:
        self.final, self.examples = final, examples
        self.folder = final.with_name(f".{final.name}.partial")
        self.manifest = manifest | {"rows_per_part": ROWS_PER_PART}
        self.parts = part_rows(len(examples), ROWS_PER_PART)
        self._lock: int | None = None

    def begin(self) -> list[int]:
        """Makes the folder, or finds it; returns the parts that are not in it yet.

        Raises:
            UserError: it was begun for something else, is in use, or cannot be written.
        """
        with self._writing():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            if (self.folder / MANIFEST).exists():
                difference = differences(read_manifest(self.folder), self.manifest)
                if difference:
                    raise UserError(
                        f"{self.folder} was begun for something else: {difference}. Delete it to "
                        "begin anew, or name another folder with reference.cache_dir"
                    )
            else:
                content = json.dumps(self.manifest, indent=2)
                write_durably(self.folder / MANIFEST, content.encode())
        return [index for index in range(len(self.parts)) if not self._is_done(index)]

    def write(self, index: int, table: pyarrow.Table) -> None:
        """Adds a part. Raises UserError if it cannot be written; the others stay."""
        content = io.BytesIO()
        pyarrow.parquet.write_table(table, content, write_page_checksum=True)
        with self._writing():
            write_durably(self.folder / part_name(index), content.getvalue())

    def finish(self, information: dict) -> None:
        """All parts are there: completes the manifest and gives the folder its name."""
        names = [part_name(index) for index in range(len(self.parts))]
        with self._writing():
            digests = {n: hashlib.sha256((self.folder / n).read_bytes()).hexdigest() for n in names}
            created = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
            whole = self.manifest | information | {"created": created, "parts": digests}
            write_durably(self.folder / MANIFEST, json.dumps(whole, indent=2).encode())
            self.folder.rename(self.final)
            flush_folder(self.final.parent)
        self.close()

    def close(self) -> None:
        """Lets another process go on."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _take_lock(self) -> None:
        """Held until the process ends, however it ends."""
        self._lock = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise UserError(
                f"{self.folder} is being written by another process; start again when it has ended"
            ) from None
        except OSError:
            pass  # a file system without locks

    def _is_done(self, index: int) -> bool:
        """Whether a part is there and whole: what was flushed and then fell to a bad disk is not."""
        rows = self.parts[index]
        with suppress(OSError, pyarrow.ArrowException):
            table = pyarrow.parquet.read_table(
                self.folder / part_name(index), page_checksum_verification=True
            )
            return table["digest"].combine_chunks() == self.examples.digests.slice(
                rows.start, len(rows)
            )
        return False

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"the reference {self.final} cannot be written: {error}. The parts that are done are "
                "kept: the same command goes on after them"
            ) from error
