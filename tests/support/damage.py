"""Ways in which a checkpoint is altered on a disk, by accident or on purpose."""

from __future__ import annotations

import os
import pickle
import random
import shutil
from pathlib import Path

import torch

from dpo_fast.training import manifest
from dpo_fast.training.tensor_files import read_tree


class Planted:
    """Makes a file when it is unpickled, as an attacker's code would do worse."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def flip_bit(file: Path, other: Path, draw: random.Random) -> None:
    content = bytearray(file.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    file.write_bytes(content)


def zero_block(file: Path, other: Path, draw: random.Random) -> None:
    """As a disk does that lost a page. The block begins where something is."""
    content = bytearray(file.read_bytes())
    start = draw.choice([place for place, value in enumerate(content[:100_000]) if value])
    size = len(content[start : start + draw.choice((1, 512, 4096))])
    content[start : start + size] = bytes(size)
    file.write_bytes(content)


def cut(file: Path, other: Path, draw: random.Random) -> None:
    os.truncate(file, draw.randrange(file.stat().st_size))


def lengthen(file: Path, other: Path, draw: random.Random) -> None:
    with file.open("ab") as stream:
        stream.write(bytes(draw.randrange(1, 100)))


def remove(file: Path, other: Path, draw: random.Random) -> None:
    file.unlink()


def exchange(file: Path, other: Path, draw: random.Random) -> None:
    """With the file of the same name in another checkpoint of the run."""
    shutil.copyfile(other, file)


def in_its_place(file: Path, other: Path, draw: random.Random) -> None:
    """A folder, a pipe or a link to nowhere."""
    file.unlink()
    draw.choice((file.mkdir, lambda: os.mkfifo(file), lambda: file.symlink_to("nowhere")))()


def plant(file: Path, other: Path, draw: random.Random) -> None:
    """A pickle that runs code: bare, or where torch looks for it."""
    content = Planted(file.parents[1] / "ran")
    with file.open("wb") as stream:
        draw.choice((pickle.dump, torch.save))(content, stream)


ALTERATIONS = {
    "bit": flip_bit,
    "zeros": zero_block,
    "cut": cut,
    "longer": lengthen,
    "missing": remove,
    "exchanged": exchange,
    "no file": in_its_place,
    "pickle": plant,
}


def files_of(folder: Path) -> list[str]:
    """Files of a checkpoint, by their path in it."""
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(found)


def plant_with_manifest(folder: Path, name: str, marker: Path) -> None:
    """Add an object that runs code to what a file holds, and make the manifest fit: all but a signature."""
    file = folder / name
    torch.save(read_tree(file) | {"planted": Planted(marker)}, file)
    known = manifest.read_manifest(folder)
    manifest.write_manifest(
        folder,
        manifest.Manifest(known.run, known.step, known.files | {name: manifest.hash_file(file)}),
    )
