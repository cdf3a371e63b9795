"""Entries of data.train and data.eval: a source with its share of the data, and how it is read."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dpo_fast.data.forms.table import NAMES as FORMS
from dpo_fast.models.hub import with_revision
from dpo_fast.wording import quoted

FORMATS = ("auto", "pairs", "messages", "unpaired", "groups", "sft", "openrlhf", *FORMS)
Format = Literal[FORMATS]
# Options of an entry that stand in for those of the data section, with that section's defaults.
READING: dict[str, Any] = {
    "format": "auto",
    "columns": {},
    "ignore_columns": [],
    "prompt_end": None,
}


class SourceOptions(BaseModel):
    """One source of several, with options of its own."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str = Field(
        min_length=1, description="a file, a glob, a folder, or a hub id, as in `train`"
    )
    revision: str | None = Field(
        default=None,
        description="branch, tag or commit of a hub id, as in org/name@revision; default: main",
        json_schema_extra={"refused": "for files and folders"},
    )
    weight: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="share of the examples of every epoch, in proportion to the other weights; default: "
        "every example once an epoch",
        json_schema_extra={"refused": "unless all sources have one; in eval"},
    )
    rows: int | None = Field(
        default=None,
        ge=1,
        description="take so many rows of it, chosen by `seed`; default: all",
        json_schema_extra={"refused": "if there are fewer"},
    )
    seed: int | None = Field(
        default=None,
        ge=0,
        description="seed of the choice of rows, and of the order in which epochs draw from the source; "
        "default: that of the data",
        json_schema_extra={"refused": "without `weight` and `rows`"},
    )
    format: Format | None = Field(default=None, description="in place of data.format")
    columns: dict[str, str] | None = Field(default=None, description="in place of data.columns")
    ignore_columns: list[str] | None = Field(
        default=None, description="in place of data.ignore_columns"
    )
    prompt_end: str | None = Field(default=None, description="in place of data.prompt_end")

    @model_validator(mode="before")
    @classmethod
    def _fold_revision(cls, values: Any) -> Any:
        """`path: org/name:split` and `revision` as org/name@revision:split."""
        if not isinstance(values, Mapping) or not isinstance(values.get("path"), str):
            return values
        name, colon, split = values["path"].partition(":")
        values = with_revision({**values, "path": name}, option="a source")
        return {**values, "path": f"{values['path']}{colon}{split}"}

    @property
    def reading(self) -> dict[str, Any]:
        """The options that stand in for those of the data section."""
        values = {name: getattr(self, name) for name in READING}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def own(self) -> dict[str, Any]:
        """The options that are given, but for the name."""
        return self.model_dump(exclude={"path", "revision"}, exclude_none=True)


Entries = Sequence[str | SourceOptions]


def read_entries(option: str, value: Any) -> Any:
    """The value of data.train or data.eval with each mapping in it as `SourceOptions`.

    Raises ValueError that names the entry and the key.
    """
    if isinstance(value, Mapping):
        raise ValueError(
            f"{option} is a mapping; expected a name, or a list in which each source is a name or a "
            "mapping with `path`"
        )
    if not isinstance(value, list):
        return value
    return [_read(f"{option}[{index}]", each) for index, each in enumerate(value)]


def _read(place: str, value: Any) -> str | SourceOptions:
    if isinstance(value, (str, SourceOptions)):
        return value
    if not isinstance(value, Mapping):
        raise ValueError(f"{place}={quoted(value)}: expected a name, or a mapping with `path`")
    try:
        return SourceOptions.model_validate(dict(value))
    except ValidationError as error:
        raise ValueError("; ".join(_explain(place, each) for each in error.errors())) from None


def _explain(place: str, error: Mapping) -> str:
    """One of pydantic's errors as the key, the value and what was expected."""
    key = f"{place}.{'.'.join(map(str, error['loc']))}"
    if error["type"] == "extra_forbidden":
        known = list(SourceOptions.model_fields)
        near = difflib.get_close_matches(str(error["loc"][-1]), known, 1, 0.5)
        hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(known)}"
        return f"unknown key {key}; {hint}"
    if error["type"] == "missing":
        return f"{key} is missing"
    return f"{key}={quoted(error['input'])}: {error['msg'][0].lower()}{error['msg'][1:]}"


def path_of(entry: str | SourceOptions) -> str:
    return entry if isinstance(entry, str) else entry.path


def check_entries(option: str, entries: Entries, sections: Mapping[str, Any]) -> None:
    """Check the entries of data.train or data.eval against each other.

    sections: the options of the data section that entries may replace.

    Raises:
        ValueError: naming the entry, its value and the remedy.
    """
    _check_duplicates(option, entries, sections)
    _check_weights(option, entries)
    for index, entry in enumerate(entries):
        if isinstance(entry, str):
            continue
        if entry.seed is not None and entry.weight is None and entry.rows is None:
            raise ValueError(
                f"{option}[{index}].seed={entry.seed} is not used: all rows are taken, once an epoch; "
                "remove it, or set weight or rows"
            )
    own = [set() if isinstance(entry, str) else set(entry.reading) for entry in entries]
    for name in set.intersection(*own) if own and option == "data.train" else ():
        if sections[name] != READING[name]:
            raise ValueError(
                f"data.{name}={sections[name]!r} is not used: every source has its own; remove it"
            )


def _check_duplicates(option: str, entries: Entries, sections: Mapping[str, Any]) -> None:
    seen: dict[str, int] = {}
    for index, entry in enumerate(entries):
        own = {} if isinstance(entry, str) else entry.reading
        first = seen.setdefault(repr((path_of(entry), {**sections, **own})), index)
        if first != index:
            name = f"{option}[{index}]" + ("" if isinstance(entry, str) else ".path")
            raise ValueError(
                f"{name}={path_of(entry)!r} is also {option}[{first}]; give it once, with a weight if it "
                "is to come more often"
            )


def _check_weights(option: str, entries: Entries) -> None:
    weights = [None if isinstance(entry, str) else entry.weight for entry in entries]
    given = [index for index, weight in enumerate(weights) if weight is not None]
    if not given:
        return
    if option == "data.eval":
        raise ValueError(
            f"data.eval[{given[0]}].weight={weights[given[0]]} is not used: evaluation takes every "
            "example once; remove it, or set rows"
        )
    lacking = [index for index, weight in enumerate(weights) if weight is None]
    if lacking:
        raise ValueError(
            f"{option}[{lacking[0]}] has no weight, but {option}[{given[0]}].weight="
            f"{weights[given[0]]}; give every source a weight, or none"
        )
