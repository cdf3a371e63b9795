"""The configuration that a run writes, and reading it from any folder.

Paths stand in it as they were given; its first line says where relative ones begin.
"""

from __future__ import annotations

import glob
import json
import os
from pathlib import Path
from typing import Any

import yaml

from dpo_fast.training.config import RunConfig
from dpo_fast.training.config_file import read_tree

CONFIG, RUN_CONFIG = "dpo_fast.yaml", "config.yaml"  # in a checkpoint; in the folder of a run
BEGIN = "# Relative paths begin at "
PATHS = {
    "model": ("path", "tokenizer", "adapter_path"),
    "reference": ("path", "old_path", "cache_dir"),
    "data": ("train", "eval", "chat_template", "cache_dir"),
}


def written(config: RunConfig) -> str:
    """A run's configuration as the text of a file."""
    begin = json.dumps(os.getcwd())
    return f"{BEGIN}{begin}\n{yaml.safe_dump(config.resolved(), sort_keys=False)}"


def read_recorded(file: Path) -> dict[str, Any]:
    """The tree of a file, each path where it leads to now.

    A path is looked for where the run began, and what lay in the run's folder in the one that it has now.
    Files that no run has written stay as they are. Raises UserError.
    """
    tree = read_tree(str(file))
    begin, run = _begin(file), _folder_of_run(file)
    train = tree.get("train")
    output_dir = train.get("output_dir") if isinstance(train, dict) else None
    if begin is None or not isinstance(output_dir, str):
        return tree
    before = os.path.normpath(os.path.join(begin, output_dir))

    def found(value: Any) -> Any:
        if isinstance(value, list):
            return [found(each) for each in value]
        if isinstance(value, dict):
            return value | {name: found(value[name]) for name in ("path",) if name in value}
        return _found(value, begin, before, run) if isinstance(value, str) else value

    for section, names in PATHS.items():
        if isinstance(own := tree.get(section), dict):
            own |= {name: found(own.get(name)) for name in names if name in own}
    model = tree.get("model")
    if isinstance(model, dict) and isinstance(under := model.get("adapters"), dict):
        model["adapters"] = {name: found(folder) for name, folder in under.items()}
    train["output_dir"] = found(output_dir) if run is None else str(run)
    return tree


def _begin(file: Path) -> str | None:
    """The folder that the run was started in, if the file says it."""
    try:
        with file.open(encoding="utf-8") as stream:
            line = stream.readline(1 << 16)
        folder = json.loads(line.removeprefix(BEGIN)) if line.startswith(BEGIN) else None
    except (OSError, ValueError):
        return None
    return folder if isinstance(folder, str) else None


def _folder_of_run(file: Path) -> Path | None:
    """The folder of the run that a file is of, or the checkpoint it lies in. None if they lie elsewhere."""
    folder = file.parent
    if file.name != RUN_CONFIG:
        folder = folder.parent if folder.name else folder.absolute().parent  # `.` has no name
    return folder if (folder / RUN_CONFIG).is_file() else None


def _found(path: str, begin: str, before: str, run: Path | None) -> str:
    """A path of a run. before: the run's folder as it was."""
    whole = os.path.normpath(os.path.join(begin, os.path.expanduser(path)))
    if _is_there(whole):
        return path if os.path.isabs(path) or begin == os.getcwd() else whole
    if run is not None and whole.startswith(before + os.sep):
        moved = os.path.join(run, os.path.relpath(whole, before))
        return moved if _is_there(moved) else path
    return path


def _is_there(path: str) -> bool:
    """Whether a path is there, or is a folder's split (`folder:test`), or a pattern that fits a file."""
    return (
        os.path.exists(path)
        or os.path.isdir(path.rpartition(":")[0])
        or (glob.has_magic(path) and next(glob.iglob(path, recursive=True), None) is not None)
    )
