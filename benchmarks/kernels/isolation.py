"""A setting in a process of its own, which another one replaces without the contender that took it down.

One process measures all contenders of a setting, because ratios come from calls that are interleaved. It
tells what it is at. If it dies or says nothing for too long, whoever it was at has that as its note, and
the next process measures the others; checks and memory that were known by then stand. If it was lost during
the times, where a device may fail long after the launch that was wrong, the next process waits for every
call, and tells whose it is.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.kernels.case import Setting
from benchmarks.kernels.lines import Key, Watch, key
from benchmarks.kernels.measure import Lineup
from benchmarks.kernels.operations import OPERATIONS, added
from benchmarks.workers import Lost, Worker

MEASURED = ("check", "memory")  # lines that stand when a process is lost
START = 120.0  # seconds to load torch, which a busy machine may need


@dataclass
class Course:
    """What is known of a setting, over all the processes that measure it.

    without: who has a note, or was done before.
    known: checks and memory, by kind, contender and mode.
    watch: what the present process is at.
    """

    setting: Setting
    lineup: Lineup
    done: list[tuple[str, Key]]
    without: set[Key] = field(default_factory=set)
    known: dict[tuple, dict] = field(default_factory=dict)
    careful: bool = False
    watch: Watch = field(default_factory=Watch)

    def tell(self, line: dict) -> None:
        self.watch.see(line)
        if line["line"] == "note":
            self.without.add(key(line))
        elif line["line"] in MEASURED:
            self.known[(line["line"], *key(line))] = line
        self.lineup.tell(line)

    def request(self, deadline: float | None) -> str:
        """What a process is asked for. The monotonic clock is the system's: what its start takes counts."""
        return json.dumps(
            {
                "setting": dataclasses.asdict(self.setting),
                "only": self.lineup.selection.only,
                "skip": self.lineup.selection.skip,
                "repeats": self.lineup.repeats,
                "with_memory": self.lineup.with_memory,
                "deadline": deadline,
                "done": self.done,
                "without": sorted(self.without),
                "known": [x for x in self.known.values() if key(x) not in self.without],
                "careful": self.careful,
            }
        )

    def goes_on(self, lost: Lost) -> bool:
        """Tell whose end it was. Whether another process can measure the others."""
        watch, contenders = self.watch, OPERATIONS[self.setting.op].contenders
        if watch.impl:
            ours = any(c.ours for c in contenders if c.name == watch.impl)
            full = lost.by == "SIGKILL"  # Linux does so when memory ends
            self.tell(watch.note("out of memory" if full else str(lost), ours, failed=not full))
            self.careful = False
            return True
        if watch.phase == "times" and not self.careful:
            self.careful = True
            return True
        self.tell(watch.lost(str(lost)))
        return False


@dataclass
class Isolated:
    """Measures settings in a process, one after the other.

    seconds: that a step of a contender may take, or a round of all.
    deadline: on the monotonic clock; what runs then is killed. None for as long as it takes.
    """

    worker: Worker
    seconds: float
    deadline: float | None = None

    @classmethod
    def begin(cls, log: Path, seconds: float, deadline: float | None) -> Isolated:
        return cls(Worker(("benchmarks.kernels.worker", *added()), log), seconds, deadline)

    def end(self) -> None:
        self.worker.end()

    def measure(self, setting: Setting, lineup: Lineup, done: list[tuple[str, Key]]) -> None:
        """Measure a setting; `lineup.tell` takes the lines.

        done: (device's name, contender and mode) of what is not measured again.
        """
        course = Course(setting, lineup, done)
        while True:
            course.watch = Watch()
            lost = self._attempt(course)
            if lost is None or self.out_of_time():
                return
            where = " ".join(
                filter(None, (course.watch.phase, course.watch.impl, course.watch.mode))
            )
            print(f"{where}: {lost}\n{lost.words}", file=sys.stderr, flush=True)
            if not course.goes_on(lost):
                return

    def out_of_time(self) -> bool:
        return self._left() == 0

    def _left(self) -> float | None:
        return None if self.deadline is None else max(0.0, self.deadline - time.monotonic())

    def _attempt(self, course: Course) -> Lost | None:
        """One process at a setting; how it was lost, if it was."""
        limit = max(START, self.seconds)
        try:
            self.worker.send(course.request(self.deadline))
            while True:
                left = self._left()
                line = self.worker.answer(limit if left is None else min(limit, left))
                limit = self.seconds
                if line["line"] == "end":
                    return None
                if line["line"] == "failed":
                    self.worker.end()
                    return Lost(line["how"])
                course.tell(line)
        except Lost as lost:
            return lost
