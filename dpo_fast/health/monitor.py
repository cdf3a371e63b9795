"""What a live run finds, each thing once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from dpo_fast.health.courses import ARROW, thinned
from dpo_fast.health.findings import examine
from dpo_fast.health.history import History, Told
from dpo_fast.numbers import MINUS

MOST_POINTS = 512  # of a curve; a longer one is thinned, so that looking stays cheap
PLAIN = str.maketrans({MINUS: "-", ARROW: "->"})


class Monitor:
    """Looks at the metrics after every line.

    config: the resolved configuration as a tree.
    lines: of metrics.jsonl that a resumed run has written already. What they told is not told again.
    standing: names of what was found at the last look.
    """

    def __init__(self, config: dict[str, Any], lines: Iterable[dict[str, Any]] = ()) -> None:
        self.history = History(config=config)
        self.standing: tuple[str, ...] = ()
        for line in lines:
            self._enter(line)

    def look(self, line: dict[str, Any]) -> dict[str, str]:
        """Enter a line. Returns what is found for the first time in the run, sentences by name."""
        self._enter(line)
        found = {check.name: check.finding for check in examine(self.history) if check.finding}
        self.standing = tuple(found)
        new = {name: plain(text) for name, text in found.items() if name not in self.history.told}
        step = float(line.get("step", 0))
        self.history.told |= {name: Told(step, text) for name, text in new.items()}
        return new

    def _enter(self, line: dict[str, Any]) -> None:
        self.history.add(line)
        for curves in (self.history.train, self.history.eval):
            for name, points in curves.items():
                if len(points) > MOST_POINTS:
                    curves[name] = thinned(points)


def plain(text: str) -> str:
    """For a terminal that may know ASCII alone."""
    return text.translate(PLAIN)
