"""HelpSteer2 has a row for each response. Consecutive rows of one prompt become one row with lists."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dpo_fast.data.config import DataConfig
from dpo_fast.data.files import RawRows

RATED = ("prompt", "response", "helpfulness")


def merged(rows: RawRows, config: DataConfig) -> RawRows:
    """The rows; those with one rated response each as one for each prompt, at the place of the first."""
    if config.format not in ("auto", "helpsteer2"):
        yield from rows
        return
    prompt, response, rating = (config.columns.get(name, name) for name in RATED)
    held: tuple[str, dict[str, Any]] | None = None
    for where, raw in rows:
        rated = _is_rated(raw, (prompt, response, rating))
        if held is not None and rated and raw[prompt] == held[1][prompt]:
            for name in (response, rating):
                held[1][name].append(raw[name])
            continue
        if held is not None:
            yield held
        held = None
        if rated:
            held = where, {**raw, response: [raw[response]], rating: [raw[rating]]}
        else:
            yield where, raw
    if held is not None:
        yield held


def merges(row: Mapping[str, Any], config: DataConfig) -> bool:
    """Whether rows like this one, after the merging, may be of several."""
    if config.format not in ("auto", "helpsteer2"):
        return False
    response, rating = (row.get(config.columns.get(name, name)) for name in RATED[1:])
    return isinstance(response, list) and isinstance(rating, list)


def _is_rated(raw: Mapping[str, Any], names: tuple[str, ...]) -> bool:
    return all(raw.get(name) is not None for name in names) and isinstance(raw[names[1]], str)
