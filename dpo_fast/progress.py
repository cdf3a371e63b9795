"""Progress where there is no terminal: a line every half minute, with the rate and the time left."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator

EVERY = 30.0  # seconds between lines
_hushed = [False]


def hush(quiet: bool = True) -> None:
    """Show no progress from here on."""
    _hushed[0] = quiet


def hushed() -> bool:
    return _hushed[0]


class SpokenProgress:
    """Says how far a long pass has come.

    description: what is done, as in "evaluating".
    total: how many parts there are; None if that is not known.
    done: how many were done before.
    say: takes a line.
    heard: when somebody else last said a line, by the clock; the half minute counts from then.
    every: seconds between lines; default: half a minute.
    """

    def __init__(
        self,
        description: str,
        total: int | None,
        say: Callable[[str], None],
        *,
        done: int = 0,
        clock: Callable[[], float] = time.monotonic,
        heard: Callable[[], float] = lambda: -math.inf,
        every: float | None = None,
    ) -> None:
        self.description, self.total, self.say = description, total, say
        self.clock, self.heard = clock, heard
        self.every = EVERY if every is None else every
        self.done, self._first = done, done
        self._began = self._spoke = clock()
        self.text = ""

    def advance(self, count: int = 1, text: str = "") -> None:
        """`count` more parts are done. text: said with the next line."""
        self.done += count
        now = self.clock()
        self.text = text
        if now - max(self._spoke, self.heard()) >= self.every:
            self._spoke = now
            self.tell()

    def tell(self) -> None:
        """Say where it stands, due or not."""
        seconds = max(self.clock() - self._began, 1e-9)
        self.say(self._line((self.done - self._first) / seconds, self.text))

    def _line(self, rate: float, text: str) -> str:
        parts = [f"{self.description}: {self.done:,}"]
        if self.total is not None:
            parts[0] += f" of {self.total:,}"
        parts.append(f"{rate:,.1f} a second" if rate >= 1 else f"{1 / rate:,.1f} s each")
        if self.total is not None:
            parts.append(f"{duration((self.total - self.done) / rate)} left")
        return ", ".join([*parts, text] if text else parts)


@contextlib.contextmanager
def shown(description: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Yields advance(count): a bar on a terminal, once it has taken two seconds, or else spoken."""
    if hushed():
        yield lambda count: None
        return
    if not sys.stderr.isatty():
        yield SpokenProgress(description, total, lambda line: print(line, file=sys.stderr)).advance
        return
    from tqdm import tqdm

    with tqdm(desc=description, total=total, delay=2) as bar:
        yield bar.update


def duration(seconds: float) -> str:
    """As people say it: 45 s, 12 min, 3 h 20 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"
