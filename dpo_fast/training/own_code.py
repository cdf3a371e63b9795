"""Code of a user's own by name: handed over in Python, named as `module:object`, or brought by a plugin."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterator, Mapping
from importlib.metadata import entry_points
from typing import Any

from dpo_fast.errors import UserError
from dpo_fast.losses.custom import load_object, loaded

CALLBACKS, SAMPLERS = "dpo_fast.callbacks", "dpo_fast.samplers"  # groups of entry points
_given: dict[
    str, Any
] = {}  # what a run in this process was handed over, by the name in its configuration


@contextlib.contextmanager
def given(objects: Mapping[str, Any]) -> Iterator[None]:
    """Inside, these objects are found by their names."""
    before = dict(_given)
    _given.update(objects)
    try:
        yield
    finally:
        _given.clear()
        _given.update(before)


def find(name: str, option: str, group: str) -> Any:
    """What a name of a configuration means.

    option: that holds the name, for errors. group: of entry points.

    Raises:
        UserError: there is no such thing, or its code cannot be loaded.
    """
    if name in _given:
        return _given[name]
    where = f"{option}={name}"
    if ":" in name:
        return load_object(name, where)
    known = {point.name: point for point in entry_points(group=group)}
    if name in known:
        point = known[name]
        return loaded(f"{where}, of the plugin {point.value}", point.load)
    near = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean {near[0]}? Otherwise " if near else ""
    raise UserError(
        f"{where}: no plugin has this name. {hint}If it is an object of the Python script that began the "
        "run, go on from that script; code of a file is named as FILE.py:NAME, of a module as MODULE:NAME"
    )
