"""Checksums of the files of a stored folder, so that nothing altered is trained on.

xxh3 by `xxhash`, which `datasets` brings: it is against disks and cables, not against forgers, and keeps up
with memory.
"""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import xxhash

SEAL_FILE = "checksums.json"
PIECE = 4 << 20


def seal(folder: Path) -> None:
    """Write the sizes and checksums of all files of a folder into it."""
    names = sorted(file.name for file in folder.iterdir() if file.name != SEAL_FILE)
    text = json.dumps(dict(zip(names, _sums(folder, names))), indent=1)
    whole = {"files": json.loads(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    (folder / SEAL_FILE).write_text(json.dumps(whole, indent=1), encoding="utf-8")


def damage(folder: Path) -> str | None:
    """What is not as it was when the folder was sealed, in words; None if all of it is."""
    try:
        whole = json.loads((folder / SEAL_FILE).read_text(encoding="utf-8"))
        files = whole["files"]
        text = json.dumps(files, indent=1)
        if hashlib.sha256(text.encode()).hexdigest() != whole["sha256"]:
            return f"{SEAL_FILE} is altered"
        found = _sums(folder, list(files))
    except OSError as error:
        return f"{error.strerror or error}: {error.filename}"
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return f"{SEAL_FILE} is altered"
    wrong = [name for name, sums in zip(files, found) if sums != files[name]]
    return f"{wrong[0]} is altered" if wrong else None


def _sums(folder: Path, names: list[str]) -> list[list]:
    """Size and checksum of each file. Raises OSError."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        return list(threads.map(lambda name: _sum(folder / name), names))


def _sum(file: Path) -> list:
    digest, size = xxhash.xxh3_128(), 0
    with file.open("rb", buffering=0) as content:
        buffer = memoryview(bytearray(min(PIECE, os.fstat(content.fileno()).st_size + 1)))
        while count := content.readinto(buffer):
            digest.update(buffer[:count])
            size += count
    return [size, digest.hexdigest()]
