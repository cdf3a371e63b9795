"""Files of JSON lines that are written while something is measured, and may be cut off at any moment."""

from __future__ import annotations

import json
from pathlib import Path


def begin(path: Path, keep: bool = False) -> list[dict]:
    """Make a file ready for `add`; returns the lines that it has. keep: False empties it first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not keep:
        path.unlink(missing_ok=True)
    elif path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n"):
        with path.open("a") as file:  # the last line was cut off: the next one begins its own
            file.write("\n")
    return read(path)


def add(path: Path, line: dict) -> None:
    """Add a line; it is in the file when this returns."""
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def read(path: Path) -> list[dict]:
    """The lines of a file; one that was cut off in the writing is left out."""
    found = []
    for text in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict):
            found.append(line)
    return found
