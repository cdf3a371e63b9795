"""The files, folders and hub data sets that a name stands for, and hashes of their content."""

from __future__ import annotations

import difflib
import glob
import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dpo_fast.data.arrow_files import UNREADABLE
from dpo_fast.data.files import RawRows, count_file, read_file, suffix_of
from dpo_fast.data.folders import Role, choose_split, files_of
from dpo_fast.data.lines import check_size
from dpo_fast.data.verdicts import BadRow, BadRows
from dpo_fast.errors import UserError
from dpo_fast.wording import clipped

HUB_ID = re.compile(
    r"(?P<name>[\w.-]+(/[\w.-]+)?)(@(?P<revision>[^@:\s]+))?"
    r"(:((?P<config>[\w.-]+)/)?(?P<split>[\w.\[\]:%+-]+))?"
)


@dataclass(frozen=True)
class FileSource:
    """One JSON, JSON Lines, Parquet or Arrow file."""

    path: Path

    def identity(self) -> str:
        """Changes when the file's content or name does."""
        return f"{self.path}={_hash_files([self.path])}"

    def rows(self, bad: BadRows) -> RawRows:
        return read_file(self.path, bad)

    def count(self, bad: BadRows) -> int:
        """Rows, broken ones included. bad: as for `rows`, but its own."""
        return count_file(self.path, bad)

    def __str__(self) -> str:
        return str(self.path)


@dataclass(frozen=True)
class SavedSource:
    """A folder written by `save_to_disk` of `datasets`. split: None where it has none."""

    path: Path
    split: str | None

    def identity(self) -> str:
        files = sorted(path for path in self.path.rglob("*") if path.is_file())
        return f"{self}={_hash_files(files)}"

    @cached_property
    def _data(self) -> Any:
        import datasets

        try:
            data = datasets.load_from_disk(str(self.path))
            data = data if self.split is None else data[self.split]
            data.data.table.validate(full=True)  # a damaged one can end the process
            return undecoded(data.with_format(None))  # a format may leave columns out
        except Exception as error:  # the loader of a library, which a damaged folder leads anywhere
            reason = clipped(str(error), 500)
            raise UserError(f"{self.path}: not a readable datasets folder: {reason}") from error

    def rows(self, bad: BadRows) -> RawRows:
        return _numbered(str(self), self._data, bad)

    def count(self, bad: BadRows) -> int:
        """Rows."""
        return len(self._data)

    def __str__(self) -> str:
        return f"{self.path}:{self.split}" if self.split else str(self.path)


@dataclass(frozen=True)
class HubSource:
    """A data set of the Hugging Face hub, downloaded and cached by `datasets`.

    revision: branch, tag or commit; None: main.
    config: one of the data set's configurations; None: its only one, or its default.
    """

    name: str
    split: str
    revision: str | None = None
    config: str | None = None

    @cached_property
    def _data(self) -> Any:
        import datasets

        try:
            return undecoded(
                datasets.load_dataset(
                    self.name, self.config, split=self.split, revision=self.revision
                )
            )
        except (OSError, ValueError, RuntimeError) as error:
            if self.revision is not None:
                raise UserError(
                    f"{self}: no data set on the hub with revision {self.revision!r} and split "
                    f"{self.split!r}: {error}"
                ) from error
            raise UserError(
                f"{self.name}: neither a file or folder here nor a data set on the hub with split "
                f"{self.split!r}: {error}.{_near(Path(self.name))} Give a path, or the hub id as "
                "name:split, or name:config/split where it has several configurations"
            ) from error

    def identity(self) -> str:
        return f"{self}={self._data._fingerprint}"

    def rows(self, bad: BadRows) -> RawRows:
        return _numbered(str(self), self._data, bad)

    def count(self, bad: BadRows) -> int:
        """Rows."""
        return len(self._data)

    def __str__(self) -> str:
        name = self.name if self.revision is None else f"{self.name}@{self.revision}"
        config = "" if self.config is None else f"{self.config}/"
        return f"{name}:{config}{self.split}"


Source = FileSource | SavedSource | HubSource


def resolve(names: list[str], role: Role = "train") -> list[Source]:
    """The sources that the names of data.train or data.eval stand for, in order.

    A folder stands for the files of one of its splits (`folders.py`) and a glob for its matches, in
    alphabetical order. Raises UserError when a name stands for nothing, or may mean several splits.
    """
    return [source for name in names for source in _resolve(name, role)]


def read_rows(source: Source, bad: BadRows) -> Iterator[tuple[str, dict[str, Any]]]:
    """Streams (where, row). Broken rows go to `bad`; raises UserError for an empty source."""
    before = bad.total
    empty = True
    for item in source.rows(bad):
        empty = False
        yield item
    if empty and bad.total == before:
        raise UserError(f"{source}: there are no rows in it; expected one example per row")


def _resolve(name: str, role: Role) -> list[Source]:
    path = Path(os.path.expanduser(name))
    if path.is_dir():
        return _folder(path, None, role)
    if path.is_file():
        return [FileSource(path)]
    if path.exists():
        raise UserError(
            f"{name}: not a file that can be read twice, but a device or a pipe; name a file or a folder"
        )
    if any(character in name for character in "*?["):
        found = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
        files = [FileSource(match) for match in found if match.is_file()]
        if files:
            return files
    base, _, split = name.rpartition(":")
    if base and Path(os.path.expanduser(base)).is_dir():
        return _folder(Path(os.path.expanduser(base)), split, role)
    hub = HUB_ID.fullmatch(name)
    if hub is None or suffix_of(path) or name.startswith((".", "~")):
        raise UserError(f"{name}: no such file, folder or glob match.{_near(path)}")
    if name == hub["name"] and "/" not in name:  # far likelier a word, or a file without its ending
        raise UserError(
            f"{name}: no such file or folder.{_near(path)} A data set of the hub has an owner before it "
            f"(owner/{name}) or a split behind it ({name}:train)"
        )
    return [HubSource(hub["name"], hub["split"] or "train", hub["revision"], hub["config"])]


def _folder(path: Path, split: str | None, role: Role) -> list[Source]:
    if (path / "dataset_dict.json").is_file():
        splits = _saved_splits(path / "dataset_dict.json")
        return [SavedSource(path, choose_split(path, splits, split, role))]
    if (path / "state.json").is_file():
        if split is not None:
            raise UserError(f"{path}:{split}: this folder has no splits; leave out {split!r}")
        return [SavedSource(path, None)]
    return [FileSource(file) for file in files_of(path, split, role)]


def _saved_splits(file: Path) -> list[str]:
    try:
        splits = list(json.loads(file.read_text(encoding="utf-8"))["splits"])
        if not all(isinstance(split, str) for split in splits):
            raise ValueError("names of splits that are no text")
        return splits
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{file.parent}: not a readable datasets folder: {error}") from error


def _near(path: Path) -> str:
    """A sentence about the names in the folder that come closest."""
    if not path.parent.is_dir():
        return f" There is no folder {str(path.parent)!r}."
    names = sorted(child.name for child in path.parent.iterdir())
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(map(repr, near))}?" if near else ""


def undecoded(data: Any) -> Any:
    """A data set of `datasets` that gives images as they are stored: bytes or a path."""
    import datasets

    features = {name: _undecoded(each) for name, each in data.features.items()}
    if features == dict(data.features):
        return data
    info = data.info.copy()
    info.features = datasets.Features(features)
    return datasets.Dataset(data.data, info, data.split, data._indices, data._fingerprint)


def _undecoded(feature: Any) -> Any:
    import datasets

    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(feature, dict):
        return {name: _undecoded(each) for name, each in feature.items()}
    if isinstance(feature, (datasets.List, datasets.LargeList)):
        return type(feature)(_undecoded(feature.feature))
    return feature


def _numbered(name: str, data: Any, bad: BadRows) -> RawRows:
    number = 0
    while number < len(data):
        rows = iter(data if number == 0 else data.select(range(number, len(data))))
        while number < len(data):
            number += 1
            where = f"{name}:{number}"
            try:
                row = next(rows)
                check_size(row, bad.max_row_bytes)
            except BadRow as verdict:
                bad.reject(where, verdict)
            except UNREADABLE as error:
                verdict = BadRow(
                    "damaged row", f"it cannot be read: {error or type(error).__name__}"
                )
                bad.reject(where, verdict)
                break  # the iterator is done: begin a new one behind the row
            else:
                yield where, row


def _hash_files(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        try:
            with open(path, "rb") as file:
                name = os.fsencode(path.name)  # which need not be Unicode
                digest.update(name + f":{path.stat().st_size}:".encode())
                for chunk in iter(lambda: file.read(1 << 20), b""):
                    digest.update(chunk)
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()
