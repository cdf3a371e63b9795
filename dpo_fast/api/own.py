"""Callbacks and samplers that are handed over as objects, and their names in the configuration."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from dpo_fast.api.options import HERE
from dpo_fast.errors import UserError


def named_callbacks(given: Any) -> tuple[list[Any], dict[str, Any]]:
    """The entries of train.callbacks, and the objects among them by their names.

    given: a callback or a list of them: objects, classes, names, and names with options.

    Raises:
        UserError: a name that another object has is given, too.
    """
    one = isinstance(given, (str, Mapping, type)) or not isinstance(given, Iterable)
    entries: list[Any] = []
    objects: dict[str, Any] = {}
    for each in [given] if one else given:
        if isinstance(each, (str, Mapping)):
            entries.append(dict(each) if isinstance(each, Mapping) else each)
            continue
        name = _unused(_name(each, "callback"), objects)
        entries.append(name)
        objects[name] = each
    if same := [each for each in entries if isinstance(each, str) and entries.count(each) > 1]:
        raise UserError(f"{HERE}: callbacks has {same[0]} twice; give it once")
    return entries, objects


def named_sampler(given: Any) -> tuple[str, dict[str, Any]]:
    """The value of train.sampler, and the object by it if it is one."""
    if isinstance(given, (str, os.PathLike)):
        return str(given), {}
    name = _name(given, "sampler")
    return name, {name: given}


def _name(each: Any, otherwise: str) -> str:
    name = getattr(each, "__name__", type(each).__name__)
    return name if name.isidentifier() else otherwise  # that of a lambda is none


def _unused(name: str, objects: Mapping[str, Any]) -> str:
    found, count = name, 1
    while found in objects:
        count += 1
        found = f"{name}-{count}"
    return found
