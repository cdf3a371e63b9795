"""A configuration file and key=value as a tree. Nothing large is imported: mistakes are told at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

from dpo_fast.errors import UserError

SECTIONS = (
    "model",
    "data",
    "loss",
    "reference",
    "train",
    "parallel",
    "log",
    "health",
)  # of RunConfig


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice. PyYAML alone would keep the last."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} stands twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_tree(path: str, overrides: Sequence[str] = ()) -> dict:
    """The sections of a YAML file, with `section.key=value` overrides. They are not checked.

    Raises:
        UserError: the file or an override cannot be read.
    """
    file = Path(path)
    try:
        tree = yaml.load(file.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise UserError(f"{path}: no such configuration file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected sections ({', '.join(SECTIONS)})")
    for override in overrides:
        _apply(tree, override)
    return tree


def _apply(tree: dict, override: str) -> None:
    """Set one key of a tree, `section.key=value`. Raises UserError."""
    key, separator, text = override.partition("=")
    names = key.split(".")
    if not separator or not all(names):
        raise UserError(f"{override!r}: expected section.key=value, like train.max_steps=100")
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        why = getattr(error, "problem", None) or "it breaks off"
        raise UserError(f"{override!r}: the value is not YAML ({why}); put it in quotes") from None
    for name in names[:-1]:
        if tree.get(name) is None:
            tree[name] = {}
        tree = tree[name]
        if not isinstance(tree, dict):
            raise UserError(f"{override!r}: {name} is not a section")
    tree[names[-1]] = value
