"""Finished pieces of work, one JSON line each, in files that every rank appends to.

A line counts once it is whole, so a process that is killed, a disk that fills up, or a power cut costs the
piece that was in work. Any number of ranks goes on where others stopped.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dpo_fast.judging.lines import Lines, read_lines


class Journal:
    """Lines of one kind of work in a folder.

    name: of the work. rank: whose file this process appends to. remedy: as in `Lines`.
    """

    def __init__(self, folder: Path, name: str, rank: int, remedy: str = "") -> None:
        self.folder, self.name = folder, name
        self._lines = Lines(folder / f"{name}-{rank:05d}.jsonl", remedy)

    def read(self) -> Iterator[tuple[int, Any]]:
        """The number and the content of every piece; of one that was done twice both."""
        for file in sorted(self.folder.glob(f"{self.name}-*.jsonl")):
            for piece in read_lines(file):
                if isinstance(piece.get("number"), int) and "content" in piece:
                    yield piece["number"], piece["content"]

    def numbers(self) -> set[int]:
        """The numbers of the pieces that are done."""
        return {number for number, _ in self.read()}

    def append(self, number: int, content: Any) -> None:
        """Add a piece. Raises UserError if it cannot be written."""
        self._lines.append({"number": number, "content": content})

    def close(self) -> None:
        """Bring what was added to the disk. Raises UserError."""
        self._lines.close()
