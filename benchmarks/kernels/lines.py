"""What a run tells as it goes: a line for everything that becomes known, at once.

    setting   what is measured from here on, and on what machine; who: contenders and modes;
              least: rounds that make a time final
    missing   contender, mode, reason: it cannot run here
    spare     contender: left out unless --only has its name
    check     contender, mode, package, errors, schedule, products: its first call, held against the truth
    memory    contender, mode, peak_mib
    round     milliseconds of every call of a round, by name
    note      contender, mode, note, failed: why it has no time, and whether that fails the run
    lost      phase, how: nothing could be measured behind this
    phase     what comes next, of whom: for who waits, not for the file

Lines in a file are about the setting before them. A setting that was begun again has several segments.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from benchmarks.kernels.case import Case, Setting
from benchmarks.machine import environment

Key = tuple[str, str]  # contender, mode
Tell = Callable[[dict], None]


def opening(setting: Setting, who: list[Key], least: int) -> dict:
    """The first line of a segment."""
    return {
        "line": "setting",
        "setting": dataclasses.asdict(setting),
        "environment": environment(setting.device),
        "who": [list(name) for name in who],
        "least": least,
    }


def about(kind: str, contender: str, mode: str, **values) -> dict:
    """A line about a contender in a mode."""
    return {"line": kind, "impl": contender, "mode": mode} | values


def key(line: dict) -> Key:
    return line["impl"], line["mode"]


def call_name(contender: str, mode: str) -> str:
    """A contender's name among the calls of a round."""
    return f"{contender} / {mode}"


@dataclass
class Segment:
    """The lines of one go at a setting.

    lost: where and how it ended, if nothing could go on behind that.
    checks, peaks, notes: by contender and mode. failed: the notes that fail the run.
    rounds: milliseconds by name.
    """

    setting: Setting
    environment: dict
    who: list[Key]
    least: int
    checks: dict[Key, dict] = field(default_factory=dict)
    peaks: dict[Key, float] = field(default_factory=dict)
    notes: dict[Key, str] = field(default_factory=dict)
    failed: dict[Key, str] = field(default_factory=dict)
    rounds: list[dict[str, float]] = field(default_factory=list)
    lost: str = ""

    @property
    def place(self) -> tuple:
        """What is the same in all rows of a setting: its sizes, and the device."""
        return *self.setting.sizes, self.environment["device"]

    @classmethod
    def of(cls, line: dict) -> Segment:
        values = line["setting"] | {"modes": tuple(line["setting"]["modes"])}
        who = [tuple(name) for name in line["who"]]
        return cls(Setting(**values), line["environment"], who, line["least"])

    def take(self, line: dict) -> None:
        kind = line["line"]
        if kind == "check":
            self.checks[key(line)] = line
        elif kind == "memory":
            self.peaks[key(line)] = line["peak_mib"]
        elif kind == "note":
            self.notes[key(line)] = line["note"]
            if line["failed"]:
                self.failed[key(line)] = line["note"]
        elif kind == "round":
            self.rounds.append(line["ms"])
        elif kind == "lost":
            self.lost = f"{line['phase']}: {line['how']}"

    def case(self, mode: str) -> Case:
        return self.setting.case(mode)

    def series(self, name: str) -> list[float]:
        """Milliseconds of a call, by round."""
        return [ms[name] for ms in self.rounds if name in ms]


def segments(lines: Iterable[dict]) -> list[Segment]:
    found: list[Segment] = []
    for line in lines:
        if line.get("line") == "setting":
            found.append(Segment.of(line))
        elif found:
            found[-1].take(line)
    return found


@dataclass
class Watch:
    """What a measurement is at, from what it tells."""

    phase: str = "start"
    impl: str = ""
    mode: str = ""

    def see(self, line: dict) -> None:
        if line["line"] == "phase":
            self.phase, self.impl, self.mode = line["phase"], line["impl"], line["mode"]

    def note(self, why: str, ours: bool, failed: bool = True) -> dict:
        """The line for the contender that it is at, which was the end of it."""
        return about("note", self.impl, self.mode, note=why, failed=ours and failed)

    def lost(self, how: str) -> dict:
        return {"line": "lost", "phase": self.phase, "how": how}
