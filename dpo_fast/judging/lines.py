"""A file that grows by lines of JSON. What a killed process wrote in part is passed over."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dpo_fast import durable

FLUSH_SECONDS = 2.0  # between the times that lines are brought to the disk


class Lines:
    """Appends lines; several threads may. The file is made with the first one.

    remedy: what is safe, and how to go on, where it cannot be written.
    """

    def __init__(self, file: Path, remedy: str) -> None:
        self.file, self.remedy = file, remedy
        self._lock = threading.Lock()
        self._descriptor: int | None = None
        self._flushed = 0.0

    def append(self, value: dict[str, Any]) -> None:
        """Raises UserError if it cannot be written; the file is as good as before."""
        # The escape of half a surrogate pair is that of JSON, too.
        content = json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
        with self._lock, durable.writing(self.file, self.remedy):
            if self._descriptor is None:
                self._descriptor = _opened(self.file)
            while content:  # a full disk takes a part
                content = content[os.write(self._descriptor, content) :]
            if time.monotonic() - self._flushed > FLUSH_SECONDS:
                os.fsync(self._descriptor)
                self._flushed = time.monotonic()

    def close(self) -> None:
        """Bring what was added to the disk. Raises UserError."""
        with self._lock, durable.writing(self.file, self.remedy):
            descriptor, self._descriptor = self._descriptor, None
            if descriptor is not None:
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)


def read_lines(file: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file; lines that are none are left out."""
    with file.open("rb") as stream:
        for line in stream:
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(value, dict):
                yield value


def _opened(file: Path) -> int:
    """A file to append to, whose last line is whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(file, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    size = os.fstat(descriptor).st_size
    if size and os.pread(descriptor, 1, size - 1) != b"\n":
        os.write(descriptor, b"\n")
    return descriptor
