"""Images that came inside rows, or over a network, kept in one Arrow file beside the tokens.

Images in files of their own stay there: their path and digest are enough to find them again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow

from dpo_fast.data.images.files import ImageFile
from dpo_fast.errors import UserError

IMAGES_FILE = "images.arrow"
STATES_FILE = "image_files.json"  # of images in files of their own
SCHEMA = pyarrow.schema([("digest", pyarrow.binary()), ("content", pyarrow.large_binary())])


class ImageWriter:
    """Writes images to a file, each once. The file is there from the first of them on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = self._writer = None
        self._known: set[bytes] = set()
        self._states: dict[str, list[int]] = {}

    def __enter__(self) -> ImageWriter:
        return self

    def __exit__(self, *_: object) -> None:
        for each in (self._writer, self._file):
            if each is not None:
                each.close()
        if self._states:
            text = json.dumps(self._states)
            self.path.with_name(STATES_FILE).write_text(text, encoding="utf-8")

    def keep(self, image: ImageFile) -> dict[str, Any]:
        """What finds the image again: digest and path, as JSON holds them."""
        if image.path is not None:
            self._states[image.path] = _state(image.path)
        elif image.digest not in self._known:
            if self._writer is None:
                self._file = pyarrow.OSFile(str(self.path), "wb")
                self._writer = pyarrow.ipc.new_file(self._file, SCHEMA)
            row = {"digest": [image.digest], "content": [image.content]}
            self._writer.write_batch(pyarrow.RecordBatch.from_pydict(row, schema=SCHEMA))
            self._known.add(image.digest)
        return {"digest": image.digest.hex(), "path": image.path}


def changed_image(folder: Path) -> str | None:
    """The path of an image that is not as it was when a folder was written; None if all of them are.

    It goes by times and sizes. `ImageStore` goes by the content, when it is read.
    """
    try:
        text = (folder / STATES_FILE).read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    states = json.loads(text)
    with ThreadPoolExecutor(16) as threads:  # of a network's disk each takes a while
        found = threads.map(_state, states)
        return next((path for path, now in zip(states, found) if now != states[path]), None)


def _state(path: str) -> list[int]:
    """Size and time of a file, in nanoseconds; empty if it is not there."""
    try:
        found = os.stat(path)
    except OSError:
        return []
    return [found.st_size, found.st_mtime_ns]


class ImageStore:
    """Finds the bytes of images. files: what `ImageWriter` wrote; those that are not there are empty."""

    def __init__(self, files: Sequence[Path] = ()) -> None:
        self.files = list(files)

    def __getstate__(self) -> dict[str, Any]:
        return {"files": self.files}

    def content(self, image: Mapping[str, Any]) -> bytes:
        """The bytes of an image by its `content`, its `path` or its `digest`.

        Raises UserError if the file is another one than when the rows were read.
        """
        if image.get("content") is not None:
            return image["content"]
        path, digest = image.get("path"), _binary(image["digest"])
        if path is None:
            return self._kept(digest)
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise UserError(
                f"{path}: the image was there when the rows were read, and cannot be read now: "
                f"{error.strerror}; put it back, or leave its rows out"
            ) from None
        if hashlib.sha256(content).digest() != digest:
            raise UserError(
                f"{path}: the image has changed since the rows were read; run again, and they are read anew"
            )
        return content

    def _kept(self, digest: bytes) -> bytes:
        if digest not in self._places:
            raise UserError(
                f"the image {digest.hex()} is not in {', '.join(map(str, self.files))}; delete the folder "
                "and run again"
            )
        reader, place = self._places[digest]
        return reader.get_batch(place)["content"][0].as_py()

    @cached_property
    def _places(self) -> dict[bytes, tuple[Any, int]]:
        found = {}
        for file in self.files:
            if not file.exists():
                continue
            reader = pyarrow.ipc.open_file(pyarrow.memory_map(str(file)))
            for place in range(reader.num_record_batches):
                found.setdefault(reader.get_batch(place)["digest"][0].as_py(), (reader, place))
        return found


def _binary(digest: bytes | str) -> bytes:
    return bytes.fromhex(digest) if isinstance(digest, str) else digest
