"""A configuration file and key=value as a tree. Nothing large is imported: mistakes are told at once."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from dpo_fast import bounded_yaml
from dpo_fast.errors import UserError
from dpo_fast.wording import clipped

SECTIONS = (
    "model",
    "data",
    "loss",
    "reference",
    "train",
    "parallel",
    "log",
    "health",
    "generate",
)  # of RunConfig
# Keys that name files and folders.
PATHS = {
    *("path", "old_path", "tokenizer", "chat_template", "cache_dir", "output_dir", "train", "eval"),
    *("resume_from_checkpoint", "nvme_path", "adapter_path"),
}
VARIABLE = re.compile(r"\$(?:\{(?P<long>[A-Za-z_]\w*)\}|(?P<short>[A-Za-z_]\w*))")


def read_tree(path: str, overrides: Sequence[str] = (), sections: Sequence[str] = SECTIONS) -> dict:
    """The sections of a YAML file, with `section.key=value` overrides. They are not checked.

    `$NAME` and `${NAME}` in what names a file or folder are environment variables.
    sections: those that an error names.

    Raises:
        UserError: the file or an override cannot be read, or a variable is not set.
    """
    try:
        with Path(path).open("rb") as file:  # as much as is read of a device that has no end
            text = file.read(4 * bounded_yaml.MOST_BYTES).decode()
        tree = bounded_yaml.load(text)
    except FileNotFoundError:
        raise UserError(f"{path}: no such configuration file") from None
    except yaml.YAMLError as error:
        raise UserError(
            f"{path} is not YAML: {clipped(' '.join(str(error).split()), 600)}"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected sections ({', '.join(sections)})")
    for override in overrides:
        apply(tree, override)
    return _with_variables(tree, path)


def _with_variables(value: Any, where: str, key: str = "") -> Any:
    """A tree with the values of environment variables in its paths. key: of the value."""
    if isinstance(value, dict):
        return {name: _with_variables(each, where, name) for name, each in value.items()}
    if isinstance(value, list):
        return [_with_variables(each, where, key) for each in value]
    if not isinstance(value, str) or key not in PATHS or os.path.exists(value):
        return value

    def content(found: re.Match) -> str:
        name = found["long"] or found["short"]
        if name not in os.environ:
            raise UserError(
                f"{where}: {key}={value}: the environment variable {name} is not set; set it, or write "
                "the path as it is"
            )
        return os.environ[name]

    return VARIABLE.sub(content, value)


def apply(tree: dict, override: str) -> None:
    """Set one key of a tree, `section.key=value`. Raises UserError."""
    key, separator, text = override.partition("=")
    names = key.split(".")
    if not separator or not all(names):
        raise UserError(f"{override!r}: expected section.key=value, like train.max_steps=100")
    try:
        value = bounded_yaml.load(text)
    except yaml.YAMLError as error:
        why = getattr(error, "problem", None) or "it breaks off"
        raise UserError(f"{override!r}: the value is not YAML ({why}); put it in quotes") from None
    for name in names[:-1]:
        if isinstance(tree, dict) and tree.get(name) is None:
            tree[name] = {}
        tree = tree[_key(tree, name, override)]
        if not isinstance(tree, (dict, list)):
            raise UserError(f"{override!r}: {name} is not a section")
    tree[_key(tree, names[-1], override)] = value


def _key(tree: dict | list, name: str, override: str) -> str | int:
    """A name as the key of a section, or as the index of a list. Raises UserError."""
    if isinstance(tree, dict):
        return name
    if not name.isdecimal() or int(name) >= len(tree):
        raise UserError(
            f"{override!r}: {name} is no entry of a list of {len(tree)}; they count from 0"
        )
    return int(name)
