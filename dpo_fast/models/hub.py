"""Models of the hub by name and revision: `org/name@revision`, a branch, a tag or a commit."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

REVISED = re.compile(r"(?P<name>\w[\w.-]*(/\w[\w.-]*)?)@(?P<revision>[^@\s]+)")


def split_revision(path: str) -> tuple[str, str | None]:
    """A hub id and its revision; of a folder, or without `@`, the path itself and None."""
    found = REVISED.fullmatch(path)
    if found is None or os.path.exists(os.path.expanduser(path)):
        return path, None
    return found["name"], found["revision"]


def source(path: str) -> dict[str, str]:
    """The arguments of `from_pretrained` that say where a model lies."""
    name, revision = split_revision(path)
    return {"pretrained_model_name_or_path": name} | ({"revision": revision} if revision else {})


def file_of(where: Mapping[str, Any], name: str) -> Path | None:
    """A file of a folder or a hub id; None if it has none of that name. where: as `source` gives it."""
    from transformers.utils import cached_file

    found = cached_file(
        where["pretrained_model_name_or_path"],
        name,
        revision=where.get("revision"),
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found)


def has_processor(where: Mapping[str, Any]) -> bool:
    """Whether a model has the files of a processor. where: as `source` gives it."""
    names = ("preprocessor_config.json", "processor_config.json")
    return any(file_of(where, name) is not None for name in names)


def with_revision(values: Any, path: str = "path", option: str = "model") -> Any:
    """The values of a section with its `revision` written behind the hub id: `org/name@revision`.

    Raises:
        ValueError: there is no hub id that it could be of, or one that has a revision.
    """
    if not isinstance(values, Mapping) or values.get("revision") is None:
        return values
    name, revision = values.get(path), values["revision"]
    place = f"{option}.revision={revision}"
    if not isinstance(name, str):
        raise ValueError(f"{place} is of {option}.{path}, which is not set")
    if os.path.exists(os.path.expanduser(name)) or name.startswith((".", "/", "~")):
        raise ValueError(
            f"{place}: {option}.{path}={name} is a folder; revisions are of hub ids. Leave it out"
        )
    if split_revision(name)[1] is not None:
        raise ValueError(f"{option}.{path}={name} names a revision, and so does {place}; keep one")
    whole = f"{name}@{revision}"
    if REVISED.fullmatch(whole) is None:
        raise ValueError(
            f"{place}: expected a branch, a tag or a commit of a hub id like org/name, not of {name!r}"
        )
    return {**values, path: whole, "revision": None}


def commit_of(path: str) -> str | None:
    """The commit of a hub id's files, as they are loaded; None if its repository has none."""
    from transformers.utils import hub

    name, revision = split_revision(path)
    return hub.extract_commit_hash(hub.cached_file(name, "config.json", revision=revision), None)


def cached_revisions(path: str) -> str:
    """What of a hub id's revisions lies in the cache, for an error; empty where nothing does."""
    from huggingface_hub import constants

    name, _ = split_revision(path)
    folder = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    refs = sorted(str(file.relative_to(folder / "refs")) for file in folder.glob("refs/**/*"))
    commits = sorted(child.name for child in folder.glob("snapshots/*"))
    return ", ".join([*refs, *commits])
