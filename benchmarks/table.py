"""Numbers in columns, as they are printed."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Column(NamedTuple):
    """A title, and under it the value of that name in every row, both flush right. An empty value stays
    empty."""

    title: str
    name: str
    width: int
    form: Callable[[float], str]


def header(columns: tuple[Column, ...]) -> str:
    return "".join(f"{column.title:>{column.width}}" for column in columns)


def line(columns: tuple[Column, ...], row: dict) -> str:
    return "".join(f"{_text(column, row[column.name]):>{column.width}}" for column in columns)


def _text(column: Column, value) -> str:
    return "" if value == "" else column.form(value)
