"""manifest.json of a checkpoint: every file with its size and sha256, the step, and the run.

It is written when everything else is on the disk, and read before anything else is loaded. It tells damage
and mixtures of two checkpoints. It is no signature: who can write the folder can write it too, so files are
read as tensors only (`training/tensor_files.py`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

from dpo_fast import durable

NAME, FORMAT = "manifest.json", 1
ADDED = "does not belong to it; move it away"
CHUNK = 1 << 22
MOST_BYTES = 1 << 26  # of a manifest: 400,000 files
THREADS = 8


class DamagedError(ValueError):
    """What is wrong with a checkpoint, as a clause."""


@dataclass(frozen=True)
class Entry:
    """A file as it was written. size: in bytes. sha256: in hex."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """run: identity of the run that wrote the checkpoint. files: by their path in the folder."""

    run: str
    step: int
    files: dict[str, Entry]


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json, which holds its own hash too. Raises OSError."""
    files = {name: asdict(manifest.files[name]) for name in sorted(manifest.files)}
    content = {"format": FORMAT, "run": manifest.run, "step": manifest.step, "files": files}
    content["sha256"] = _hash_of(content)
    durable.write_file(folder / NAME, json.dumps(content, indent=1) + "\n")


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint. Raises DamagedError if it is missing, damaged or of another format."""
    if (folder / NAME).exists() and not (folder / NAME).is_file():
        raise DamagedError(f"{NAME} is not a file")  # opening a pipe would wait for a writer
    try:
        if (size := (folder / NAME).stat().st_size) > MOST_BYTES:
            raise DamagedError(f"{NAME} is damaged: it has {size:,} bytes")
        content = json.loads((folder / NAME).read_text(encoding="utf-8"))
        if content.get("format") != FORMAT:
            raise DamagedError(
                f"{NAME} has format {content.get('format')!r} and this version of dpo_fast reads {FORMAT}: "
                "resume with the version that wrote it"
            )
        if content.pop("sha256") != _hash_of(content):
            raise DamagedError(f"{NAME} is damaged: it does not fit its own hash")
        files = {
            name: Entry(int(entry["size"]), str(entry["sha256"]))
            for name, entry in content["files"].items()
        }
        found = Manifest(str(content["run"]), int(content["step"]), files)
    except FileNotFoundError:
        raise DamagedError(
            f"{NAME} is missing: it was lost, or a version of dpo_fast wrote the checkpoint that wrote "
            "none, and only that version can resume it"
        ) from None
    except DamagedError:
        raise
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DamagedError(f"{NAME} is damaged: {durable.first_line(error)}") from None
    for name in files:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise DamagedError(f"{NAME} is damaged: {name!r} lies outside of the folder")
    return found


def differences(folder: Path, manifest: Manifest, names: Iterable[str]) -> list[str]:
    """What is wrong with these files of a checkpoint, a clause each. Large ones are read side by side."""
    names = sorted(names, key=lambda name: -manifest.files[name].size)
    with ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(lambda name: _difference(folder / name, name, manifest.files[name]), names)
        return sorted(clause for clause in found if clause)


def unlisted(folder: Path, manifest: Manifest) -> list[str]:
    """A clause for every file or folder that a checkpoint holds and its manifest does not name.

    Hidden ones are left by file managers and network file systems, and nothing reads them.
    """
    known = {NAME, *manifest.files}
    known |= {str(parent) for name in manifest.files for parent in PurePosixPath(name).parents}
    held = (path.relative_to(folder) for path in folder.rglob("*"))
    seen = (
        path.as_posix() for path in held if not any(part.startswith(".") for part in path.parts)
    )
    return [f"{name} {ADDED}" for name in sorted(seen) if name not in known]


def hash_file(file: Path) -> Entry:
    """Size and sha256 of a file as it is. Raises OSError."""
    digest, size = hashlib.sha256(), 0
    buffer = memoryview(bytearray(CHUNK))
    with file.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(buffer[:count])
            size += count
    return Entry(size, digest.hexdigest())


def _difference(file: Path, name: str, entry: Entry) -> str | None:
    try:
        if not file.exists():
            return f"{name} is missing"
        if not file.is_file():
            return f"{name} is not a file"
        size = file.stat().st_size
        if size != entry.size:
            return f"{name} has {size:,} bytes and was written with {entry.size:,}"
        if hash_file(file) != entry:
            return f"{name} does not hold the bytes that were written"
    except OSError as error:
        return f"{name} cannot be read: {error.strerror or error}"
    return None


def _hash_of(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
