"""Progress on the terminal: rank 0 speaks."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dpo_fast.training import distributed

T = TypeVar("T")
console = Console(stderr=True)


@contextmanager
def progress_bar(description: str, total: int, done: int = 0):
    """Yields advance(text=""), which moves the bar by one and shows `text` beside it."""
    if not distributed.is_main():
        yield lambda text="": None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
    )
    with Progress(*columns, console=console, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task(description, total=total, completed=done, text="")
        yield lambda text="": progress.update(task, advance=1, text=text)


def track(items: Iterable[T], description: str, total: int) -> Iterator[T]:
    """Iterate with a progress bar."""
    with progress_bar(description, total) as advance:
        for item in items:
            yield item
            advance()


def say(message: str) -> None:
    """One line from rank 0, on standard error."""
    if distributed.is_main():
        console.print(message, highlight=False, markup=False, soft_wrap=True)
