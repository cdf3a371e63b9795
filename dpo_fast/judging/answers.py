"""Answers of a judge on disk, so that nothing is asked twice."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from dpo_fast.judging.lines import Lines, read_lines

STEM = "judge-cache"
REMEDY = "What was answered before is kept: make room and run the same command"


class Answers:
    """Answers by their request. Several threads may use it; every rank writes a file of its own.

    folder: where the answers of all ranks lie. None: nothing is kept.
    """

    def __init__(self, folder: Path | None, rank: int = 0) -> None:
        self._known: dict[str, dict[str, Any]] = {}
        self._lines: Lines | None = None
        if folder is not None:
            self._lines = Lines(folder / f"{STEM}-{rank}.jsonl", REMEDY)
            for file in sorted(folder.glob(f"{STEM}-*.jsonl")):
                for line in read_lines(file):
                    if isinstance(line.get("key"), str) and "text" in line:
                        self._known[line["key"]] = line

    def find(self, request: dict[str, Any]) -> dict[str, Any] | None:
        """What was kept for a request."""
        return self._known.get(_key(request))

    def keep(self, request: dict[str, Any], answer: dict[str, Any]) -> None:
        """answer: with `text`. Raises UserError if it cannot be written."""
        key = _key(request)
        self._known[key] = answer
        if self._lines is not None:
            self._lines.append({"key": key, **answer})

    def close(self) -> None:
        if self._lines is not None:
            self._lines.close()


def _key(request: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
