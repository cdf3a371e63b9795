"""Finished pieces of work, one JSON line each, in files that every rank appends to.

A line counts once its end is there, so a process that is killed, or a disk that fills up, costs the piece
that was in work. Any number of ranks goes on where others stopped.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dpo_fast import durable

FLUSH_SECONDS = 2.0  # between the times that lines are brought to the disk


class Journal:
    """Lines of one kind of work in a folder.

    name: of the work. rank: whose file this process appends to.
    """

    def __init__(self, folder: Path, name: str, rank: int) -> None:
        self.folder, self.name, self.rank = folder, name, rank
        self._file: int | None = None
        self._flushed = 0.0

    def mend(self) -> None:
        """Take out lines that have no end, and those that a power cut damaged. Raises OSError.

        One process does it, before others append.
        """
        for file in self._files():
            lines = file.read_bytes().splitlines(keepends=True)
            whole = [line for line in lines if _is_whole(line)]
            if len(whole) < len(lines):
                durable.write_file(file, b"".join(whole))

    def read(self) -> Iterator[tuple[int, Any]]:
        """The number and the content of every piece; of one that was done twice both."""
        for file in self._files():
            with file.open("rb") as stream:
                for line in stream:
                    if line.endswith(b"\n"):
                        piece = json.loads(line)
                        yield piece["number"], piece["content"]

    def numbers(self) -> set[int]:
        """The numbers of the pieces that are done."""
        return {number for number, _ in self.read()}

    def append(self, number: int, content: Any) -> None:
        """Add a piece. Raises OSError."""
        if self._file is None:
            place = self.folder / f"{self.name}-{self.rank:05d}.jsonl"
            self._file = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        line = json.dumps({"number": number, "content": content}) + "\n"
        rest = memoryview(line.encode())
        while rest:
            rest = rest[os.write(self._file, rest) :]
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            os.fsync(self._file)
            self._flushed = time.monotonic()

    def close(self) -> None:
        """Bring what was added to the disk. Raises OSError."""
        if self._file is not None:
            os.fsync(self._file)
            os.close(self._file)
            self._file = None

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob(f"{self.name}-*.jsonl"))


def _is_whole(line: bytes) -> bool:
    try:
        return line.endswith(b"\n") and {"number", "content"} <= set(json.loads(line))
    except (ValueError, TypeError):
        return False
