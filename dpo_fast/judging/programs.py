"""Judges that are processes of their own: any command, and a rule, whose function runs in one.

So a function that never ends, or ends the process, is a time-out or a crash like that of a command.
"""

from __future__ import annotations

import hashlib
import json
import math
import queue
import sys
from collections.abc import Iterable, Iterator
from itertools import count as count_from
from pathlib import Path
from typing import Any

from dpo_fast.errors import UserError
from dpo_fast.judging.child import Child, Lost
from dpo_fast.judging.config import JudgeSection
from dpo_fast.judging.in_order import in_order
from dpo_fast.judging.samples import SampleRow
from dpo_fast.judging.verdict import (
    FAILED,
    MORE_TIME,
    UNPARSABLE,
    Failures,
    Judged,
    Verdict,
    verdict_of,
)
from dpo_fast.wording import quoted

# Python's own -c puts the folder of the call first, not that of the script: a module `config` of the
# user's stays findable.
RUN = "import runpy, sys; runpy.run_path(sys.argv.pop(1), run_name='__main__')"
WORKER = Path(__file__).with_name("rule_worker.py")
STARTING = 300.0  # seconds that a function's module may take to be imported


class ProgramJudge:
    """Asks processes, which are taken from a queue and go back to it."""

    together = 1

    def __init__(self, section: JudgeSection) -> None:
        self.section = section
        self.by_row = section.unit == "row"
        self.name = f"judge.type={section.type}"
        self.children: list[Child] = []
        self.free: queue.SimpleQueue[Child] = queue.SimpleQueue()

    def __call__(self, chunks: Iterable[list[SampleRow]]) -> Iterator[list[Judged]]:
        remedy = f"Look at the judge. {MORE_TIME}"
        reading = "Look at what the judge answers."
        failures = Failures(self.section.max_failures, self.name, remedy, reading)
        while len(self.children) < self.section.parallel:
            child = self.start()
            self.children.append(child)
            self.free.put(child)
        rows = (row for chunk in chunks for row in chunk)
        for row, judged in in_order(self._judged, rows, self.section.parallel):
            failures.note(row, judged, self.by_row)
            yield [judged]

    def close(self) -> None:
        for child in self.children:
            child.close()

    def start(self) -> Child:
        raise NotImplementedError

    def prepare(self, child: Child) -> None:
        """What comes before a line. Raises Lost."""

    def verdicts(self, child: Child, row: SampleRow) -> list[Verdict]:
        """Raises Lost."""
        raise NotImplementedError

    def _judged(self, row: SampleRow) -> tuple[SampleRow, Judged]:
        child = self.free.get()
        try:
            return row, Judged(self.verdicts(child, row))
        finally:
            self.free.put(child)

    def _ask(self, child: Child, request: dict[str, Any]) -> str:
        """The answer to a request. Raises Lost once the tries are used up."""
        line = json.dumps(request, ensure_ascii=False, default=str)
        for tries_left in range(self.section.max_retries, -1, -1):
            try:
                self.prepare(child)
                return child.ask(line, self.section.timeout_seconds)
            except Lost:
                if not tries_left:
                    raise
        raise AssertionError


class CommandJudge(ProgramJudge):
    """A program that gets a line of JSON and answers one.

    Every line has a number, `request_id`. An answer that repeats it is not taken for that of another line.
    """

    def __init__(self, section: JudgeSection) -> None:
        super().__init__(section)
        self.numbers = count_from(1)

    def start(self) -> Child:
        section = self.section
        alive = section.keep_alive
        hint = ". It must answer each line with one line, and flush it" if alive else ""
        return Child(section.arguments, "judge.command", hint=hint, keep_alive=alive)

    def verdicts(self, child: Child, row: SampleRow) -> list[Verdict]:
        shared = {"prompt": row.prompt, **row.columns}
        if self.by_row:
            asked, count = [shared | {"completions": row.completions}], len(row.completions)
        else:
            asked, count = [shared | {"completion": each} for each in row.completions], 1
        return [v for request in asked for v in self._answers(child, request, count)]

    def _answers(self, child: Child, request: dict[str, Any], count: int) -> list[Verdict]:
        request = {"request_id": next(self.numbers)} | request
        try:
            answer = self._ask(child, request)
        except Lost as lost:
            return [Verdict.without(FAILED, str(lost))] * count
        try:
            return self._parsed(answer, count, request["request_id"])
        except ValueError as error:
            child.close()  # what it says next may belong to this line: begin anew, in step
            return [Verdict.without(UNPARSABLE, str(error))] * count

    def _parsed(self, answer: str, count: int, number: int) -> list[Verdict]:
        """Raises ValueError for what is no answer to the line. number: its `request_id`."""
        try:
            value = json.loads(answer)
        except (ValueError, RecursionError):
            raise ValueError(f"{quoted(answer, 120)} is no JSON") from None
        if isinstance(value, dict) and value.get("request_id", number) != number:
            raise ValueError(f"{quoted(answer, 120)} answers another line: request_id is {number}")
        if isinstance(value, dict) and value.get("error"):
            return [Verdict.without(FAILED, str(value["error"]))] * count
        name = "scores" if self.by_row else "score"
        if isinstance(value, dict):
            if name not in value:
                raise ValueError(f"{quoted(answer, 120)} has no {name!r}")
            value = value[name]
        if not self.by_row:
            return [verdict_of(value)]
        if not isinstance(value, list) or len(value) != count:
            raise ValueError(f"{quoted(answer, 120)} is no list of {count} scores")
        return [verdict_of(each) for each in value]


class RuleJudge(ProgramJudge):
    """A Python function, in a process that holds nothing else."""

    def start(self) -> Child:
        child, about = started(self.section)
        self.by_row = about["together"]
        return child

    def prepare(self, child: Child) -> None:
        if not child.running:
            _greeted(child, self.section)

    def verdicts(self, child: Child, row: SampleRow) -> list[Verdict]:
        shared = {"prompt": row.prompt, "columns": row.columns}
        parts = [row.completions] if self.by_row else [[each] for each in row.completions]
        return [v for part in parts for v in self._answers(child, shared, part)]

    def _answers(
        self, child: Child, shared: dict[str, Any], completions: list[str]
    ) -> list[Verdict]:
        try:
            answer = json.loads(self._ask(child, shared | {"completions": completions}))
        except Lost as lost:
            answer = {"error": str(lost)}
        if "error" in answer:
            return [Verdict.without(FAILED, answer["error"])] * len(completions)
        return [verdict_of(_read(each)) for each in answer["scores"]]


def _read(value: Any) -> Any:
    """A number of the worker's: one that is not finite is written as text, which JSON has not."""
    if isinstance(value, str) and value in ("nan", "inf", "-inf"):
        return math.nan if value == "nan" else float(value)
    return value


def started(section: JudgeSection) -> tuple[Child, dict[str, Any]]:
    """A process that has the function loaded, and what it says of it. Raises UserError."""
    options = {"kwargs": section.kwargs, "weights": section.weights}
    options["aggregation"] = section.multi_objective_aggregation
    arguments = [sys.executable, "-c", RUN, str(WORKER), json.dumps(section.functions)]
    child = Child([*arguments, json.dumps(options)], "judge.function")
    try:
        return child, _greeted(child, section)
    except Lost as lost:
        named = ", ".join(section.functions)
        raise UserError(f"judge.function={named} cannot be loaded: {lost}") from None


def _greeted(child: Child, section: JudgeSection) -> dict[str, Any]:
    answer = json.loads(child.greeting(STARTING))
    if "error" in answer:
        child.close()
        raise UserError(
            f"judge.function={', '.join(section.functions)} cannot be loaded: {answer['error']}; "
            "expected module:function or path.py:function"
        )
    return answer["ready"]


def rule_identity(section: JudgeSection) -> dict[str, Any]:
    """What makes a rule the same one: the file that it stands in; of several, how they are added, too."""
    child, about = started(section)
    child.close()
    if len(section.functions) == 1:
        name, sha256 = section.functions[0], about["sha256"][0]
        return {"function": name, "sha256": sha256, "kwargs": section.kwargs}
    made = {"function": section.functions, "sha256": about["sha256"], "kwargs": section.kwargs}
    how = section.multi_objective_aggregation
    return made | {"weights": section.weights, "multi_objective_aggregation": how}


def command_identity(section: JudgeSection) -> dict[str, Any]:
    """What makes a command the same one: its words, and the files that they name."""
    files = {}
    for word in section.arguments:
        file = Path(word)
        if file.is_file() and file.stat().st_size < 1 << 24:
            files[word] = hashlib.sha256(file.read_bytes()).hexdigest()
    return {"command": section.arguments, "unit": section.unit, "files": files}
