"""`make gpu`: the steps in their order, each result a line, and at the end the table of targets."""

from __future__ import annotations

import argparse
import fnmatch
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import jsonl, workers
from benchmarks.gpu import pool, summary
from benchmarks.gpu.steps import STEPS, Step

ABSENT = ("failed", "skipped", "not_reached")  # why an item has no numbers


@dataclass
class Lines:
    """The file of results: a line of JSON each, flushed at once.

    found: all lines of the file, those of earlier runs too.
    """

    path: Path
    found: list[dict] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    start: float = field(default_factory=time.monotonic)

    @classmethod
    def at(cls, path: Path, resume: bool) -> Lines:
        return cls(path, jsonl.begin(path, keep=resume))

    def add(self, step: str, item: str, result: dict) -> None:
        line = {"step": step, "item": item, "at": round(time.monotonic() - self.start, 1)} | result
        with self.lock:
            self.found.append(line)
            jsonl.add(self.path, line)
            print(f"{line['at']:>7.1f} s  {step:<11}{item:<60}{_word(result)}", flush=True)

    def done(self, step: str) -> set[str]:
        """Items that an earlier run has finished, well or not."""
        return {x["item"] for x in self.found if x["step"] == step and "not_reached" not in x}


def _word(result: dict) -> str:
    for name in ABSENT:
        if name in result:
            return f"{name.replace('_', ' ').upper()} {str(result[name])[:300]}"
    shown = {k: v for k, v in result.items() if isinstance(v, (int, float)) and k != "seconds"}
    return "ok " + ", ".join(f"{k} {v:.4g}" for k, v in shown.items())


def run(chosen: dict[str, str], lines: Lines, folder: Path, minutes: float, rehearse: bool) -> None:
    """chosen: by step, a pattern of its items."""
    deadline = time.monotonic() + 60 * minutes
    for phase in sorted({STEPS[name].phase for name in chosen}):
        together = [name for name in chosen if STEPS[name].phase == phase]
        threads = [
            threading.Thread(
                target=_step, args=(STEPS[name], chosen[name], lines, folder, deadline, rehearse)
            )
            for name in together
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def _step(
    step: Step, pattern: str, lines: Lines, folder: Path, deadline: float, rehearse: bool
) -> None:
    if time.monotonic() > deadline:
        lines.add(step.name, "all", {"not_reached": True})
        return
    try:
        pool.work(
            step.name,
            lambda names: [
                n for n in fnmatch.filter(names, pattern) if n not in lines.done(step.name)
            ],
            lambda item, result: lines.add(step.name, item, result),
            folder=folder,
            processes=1 if rehearse else step.processes,
            seconds=step.seconds,
            deadline=deadline,
            rehearse=rehearse,
        )
    except workers.Lost as lost:
        lines.add(step.name, "all", {"failed": f"its items cannot be listed: {lost}: {lost.words}"})


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__)
    add = parser.add_argument
    add("--minutes", type=float, default=8.0, help="begin nothing after this long (default 8)")
    add("--out", type=Path, default=Path("gpu_results"), help="folder of the lines and the logs")
    add(
        "--only",
        metavar="STEP[:PATTERN],...",
        help=f"these steps, or those of their items that match: {', '.join(STEPS)}",
    )
    add("--resume", action="store_true", help="leave out what the lines in --out have")
    add(
        "--rehearse",
        action="store_true",
        help="tiny sizes on a CPU, kernels in Triton's interpreter",
    )
    given = parser.parse_args(arguments)
    parts = given.only.split(",") if given.only else list(STEPS)
    chosen = {name: pattern or "*" for name, _, pattern in (part.partition(":") for part in parts)}
    if unknown := [name for name in chosen if name not in STEPS]:
        parser.error(f"--only {','.join(unknown)}: choose from {', '.join(STEPS)}")
    lines = Lines.at(given.out / "lines.jsonl", given.resume)
    run(chosen, lines, given.out, given.minutes, given.rehearse)
    print(summary.table(lines.found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
