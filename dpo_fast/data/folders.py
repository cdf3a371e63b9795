"""Splits of a folder of files, told apart as `datasets` does: by shards, folders or file names.

data/train-00000-of-00002.parquet    shards name their split
test/pairs.jsonl                     so does a folder, by a keyword
pairs_dev.jsonl                      and a file name
README.md                            its `configs` come first: that is how the hub describes a data set
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

import yaml

from dpo_fast import bounded_yaml
from dpo_fast.data.files import SUFFIXES, suffix_of
from dpo_fast.errors import UserError
from dpo_fast.wording import quoted

Role = Literal["train", "eval"]
Splits = dict[str, list[Path]]

KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SHARD = re.compile(r"(?P<split>\w[\w.-]*)-\d{5}-of-\d{5}[.-].*")
FRONT = re.compile(r"\A---\s*\n(.*?)\n---\s*$", re.DOTALL | re.MULTILINE)
# Written beside the data by `datasets` and the hub; no rows are in them.
BESIDE = ("config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json")


def files_of(folder: Path, split: str | None, role: Role) -> list[Path]:
    """The files of one split of a folder, in alphabetical order.

    split: None stands for all files where nothing tells splits apart, else see `choose_split`.

    Raises:
        UserError: no data, no such split, or a folder that does not say what it is for.
    """
    files = [file for file in _below(folder) if suffix_of(file) and file.name not in BESIDE]
    if not files:
        raise UserError(
            f"{folder}: no data in this folder; expected files ending in {', '.join(SUFFIXES)}, or a "
            "folder saved by datasets"
        )
    splits = _described(folder) or _splits(folder, files)
    if splits is None:
        if split is not None:
            raise UserError(f"{folder}:{split}: this folder has no splits; leave out {split!r}")
        return _without_copies(folder, files)
    chosen = choose_split(folder, splits, split, role)
    if split is None:
        _check_leftovers(folder, splits, files)
    return _without_copies(folder, splits[chosen])


def choose_split(path: Path, splits: Iterable[str], split: str | None, role: Role) -> str:
    """The split that is asked for, or the one that a name without a split means.

    For training that is `train`, or a split that stands alone and is for nothing else; for evaluation a
    split that stands alone. Raises UserError, with the names of the splits.
    """
    names = list(splits)
    if split is None:
        if role == "train" and "train" in names:
            return "train"
        if len(names) == 1 and (role == "eval" or names[0] not in KEYWORDS):
            return names[0]
    elif split in names:
        return split
    what = f"no split {split!r}; it has" if split else f"data.{role} may mean any of its splits"
    raise UserError(f"{path}: {what} {', '.join(names)}. Name one as in {path}:{names[0]}")


def _below(folder: Path) -> list[Path]:
    """The files in a folder and its folders, in alphabetical order; hidden ones are not data."""
    places = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(
        folder / place
        for place in places
        if not any(part.startswith((".", "__")) for part in place.parts)
    )


def _splits(folder: Path, files: list[Path]) -> Splits | None:
    """Files by split, by the first rule that says something of any file; None if none does."""
    rules: tuple[Callable[[Path], list[str]], ...] = (_of_shard, _of_folders, _of_name)
    for rule in rules:
        found: Splits = {}
        for file in files:
            splits = rule(file.relative_to(folder))
            if len(splits) > 1:
                raise UserError(
                    f"{folder}: {file.relative_to(folder)} may be of the splits {' or '.join(splits)}; "
                    "name the files of data.train and data.eval one by one"
                )
            for split in splits:
                found.setdefault(split, []).append(file)
        if found:
            return found
    return None


def _of_shard(place: Path) -> list[str]:
    match = SHARD.fullmatch(place.name)
    return [match["split"]] if match else []


def _of_folders(place: Path) -> list[str]:
    return list(dict.fromkeys(split for part in place.parts[:-1] for split in _keywords(part)))


def _of_name(place: Path) -> list[str]:
    return _keywords(place.name.removesuffix(suffix_of(place) or ""))


def _keywords(name: str) -> list[str]:
    """The splits whose keywords stand in a name, as words of their own."""
    words = set(re.split(r"[-._ 0-9]+", name.lower()))
    return [split for split, keywords in KEYWORDS.items() if words.intersection(keywords)]


def _check_leftovers(folder: Path, splits: Splits, files: list[Path]) -> None:
    """Raises UserError for files like those of the splits that belong to none: they may be meant, too."""
    known = {file for each in splits.values() for file in each}
    suffixes = {suffix_of(file) for file in known}
    left = [file for file in files if file not in known and suffix_of(file) in suffixes]
    if left:
        raise UserError(
            f"{folder}: {left[0].relative_to(folder)} belongs to none of its splits "
            f"({', '.join(splits)}). Name a split as in {folder}:{next(iter(splits))}, or the files"
        )


def _without_copies(folder: Path, files: list[Path]) -> list[Path]:
    """The files. Raises UserError for two that differ in their suffix alone: one is made of the other."""
    names: dict[Path, Path] = {}
    for file in files:
        other = names.setdefault(file.with_name(file.name[: -len(suffix_of(file))]), file)
        if other != file:
            raise UserError(
                f"{folder}: {other.relative_to(folder)} and {file.relative_to(folder)} differ in their "
                "suffix alone, as copies of the same rows would. Name the files one by one, or take one "
                "away"
            )
    return files


def _described(folder: Path) -> Splits | None:
    """Files by split as README.md describes them; None where it does not."""
    configs = _configs(folder / "README.md")
    if not configs:
        return None
    marked = [each for each in configs if each.get("default") or len(configs) == 1]
    named = [each for each in configs if each.get("config_name") == "default"]
    if not (marked or named):
        names = ", ".join(str(each.get("config_name")) for each in configs)
        raise UserError(
            f"{folder}: README.md describes several data sets ({names}) and none is the default; name "
            "the files, as in "
            f"{folder}/*.parquet"
        )
    described: Splits = {}
    for split, patterns in _patterns((marked or named)[0]["data_files"]):
        matches = {file for each in patterns for file in _matches(folder, each)}
        if matches:
            described.setdefault(split, []).extend(sorted(matches))
    return described or None


def _matches(folder: Path, pattern: str) -> list[Path]:
    """The files in a folder, and none outside of it, that a pattern of its README stands for."""
    try:
        if ".." in Path(pattern).parts:
            raise ValueError("it leads out of the folder")
        return [file for file in folder.glob(pattern.lstrip("/")) if file.is_file()]
    except (ValueError, IndexError, NotImplementedError, OSError) as error:
        raise UserError(
            f"{folder}: README.md names {quoted(pattern)} for data: {error}; name the files yourself, as "
            f"in {folder}/*.parquet"
        ) from None


def _configs(readme: Path) -> list[dict]:
    """The data sets that the front matter of a README describes by their files."""
    if not readme.is_file():
        return []
    with readme.open(encoding="utf-8", errors="replace") as file:
        front = FRONT.search(file.read(bounded_yaml.MOST_BYTES))
    try:
        content = bounded_yaml.load(front[1]) if front else None
    except yaml.YAMLError:
        return []  # the page of a hub, which only its readers need
    configs = content.get("configs") if isinstance(content, dict) else None
    found = configs if isinstance(configs, list) else []
    return [each for each in found if isinstance(each, dict) and each.get("data_files")]


def _patterns(data_files: object) -> list[tuple[str, list[str]]]:
    """(split, patterns) of a `data_files` entry: one pattern, several, or several with splits."""
    entries = data_files if isinstance(data_files, list) else [data_files]
    found = []
    for entry in entries:
        split, paths = "train", entry
        if isinstance(entry, dict):
            split, paths = str(entry.get("split", "train")), entry.get("path", [])
        found.append(
            (split, [str(each) for each in (paths if isinstance(paths, list) else [paths])])
        )
    return found
