"""What the terminal shows: progress and messages of rank 0, and little of what libraries say."""

from __future__ import annotations

import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from dpo_fast.progress import SpokenProgress, hushed
from dpo_fast.training import distributed
from dpo_fast.training.notebook import notebook_progress
from dpo_fast.wording import printable

T = TypeVar("T")
NOTEBOOK = Console().is_jupyter
# A notebook marks standard error as a fault, and rich would show every line there as a box of its own.
console = Console(stderr=not NOTEBOOK, force_jupyter=False)
NARROW = 10  # so that the numbers beside the bar fit into 80 columns


@contextmanager
def progress_bar(description: str, total: int, done: int = 0) -> Iterator[Callable[..., None]]:
    """Yields advance(text=""), which moves the bar by one and shows `text` beside it. Rank 0 has a bar.

    Without a terminal it says a line when nothing else was said for half a minute. In a notebook the line
    is written over.
    """
    if not distributed.is_main() or hushed():
        yield lambda text="": None
        return
    if console.is_jupyter:
        with notebook_progress(description, total, done) as advance:
            yield lambda text="": advance(text=text)
        return
    if not sys.stderr.isatty():
        spoken = SpokenProgress(description, total, say, done=done, heard=_heard)
        yield lambda text="": spoken.advance(text=text)
        return
    columns = (
        TextColumn("{task.description}", table_column=Column(no_wrap=True)),
        BarColumn(bar_width=NARROW, table_column=Column(min_width=NARROW)),
        MofNCompleteColumn(table_column=Column(min_width=2 * len(str(total)) + 1)),
        TimeRemainingColumn(table_column=Column(min_width=len("0:00:00"))),
        TextColumn("{task.fields[text]}", table_column=Column(no_wrap=True)),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(description, total=total, completed=done, text="")
        yield lambda text="": progress.update(task, advance=1, text=text)


def track(items: Iterable[T], description: str, total: int) -> Iterator[T]:
    """Iterate with a progress bar."""
    with progress_bar(description, total) as advance:
        for item in items:
            yield item
            advance()


_said = [-math.inf]  # when the last line was said


def _heard() -> float:
    return _said[0]


def say(message: str, matters: bool = False) -> None:
    """One line from rank 0, on standard error. With --quiet only what matters."""
    if distributed.is_main() and (matters or not hushed()):
        _said[0] = time.monotonic()
        console.print(printable(message), highlight=False, markup=False, soft_wrap=True)


def quiet() -> None:
    """Keep libraries to warnings that matter to the user; DPO_FAST_VERBOSE=1 lets all through.

    Call it before DeepSpeed is imported.
    """
    if os.environ.get("DPO_FAST_VERBOSE", "0") == "1":
        return
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it warns that there is no GPU
    for category in (FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category)
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    for name in ("DeepSpeed", "torch.distributed", "deepspeed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if not distributed.is_main():
        logging.disable(logging.WARNING)
