"""Progress in a notebook: one line of the output, which is written over."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from dpo_fast.progress import SpokenProgress

DELAY, EVERY = 2.0, 0.5  # seconds before the line appears, and between changes of it


@contextmanager
def notebook_progress(
    description: str, total: int, done: int = 0, clock: Callable[[], float] = time.monotonic
) -> Iterator[Callable[..., None]]:
    """Yields advance(count=1, text=""). What is over within two seconds shows nothing."""
    line = Line()
    begin = clock() + DELAY - EVERY
    spoken = SpokenProgress(
        *(description, total, line), done=done, clock=clock, heard=lambda: begin, every=EVERY
    )
    try:
        yield spoken.advance
    finally:
        if line.shown is not None and spoken.done > done:
            spoken.tell()


class Line:
    """A line of plain text in the output of a cell; a call writes it over."""

    def __init__(self) -> None:
        self.shown: Any = None

    def __call__(self, text: str) -> None:
        from IPython.display import display

        content = {"text/plain": text}
        if self.shown is None:
            self.shown = display(content, raw=True, display_id=True)
        else:
            self.shown.update(content, raw=True)
