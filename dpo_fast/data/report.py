"""What became of the data: rows read, dropped and cut, and how long they are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from dpo_fast.data.kinds import COMPLETIONS, GROUPS, PAIRS
from dpo_fast.data.lengths import RowLengths
from dpo_fast.data.verdicts import Tally

PERCENTILES = {"p5": 5, "p25": 25, "p50": 50, "p75": 75, "p95": 95, "p99": 99, "max": 100}


@dataclass
class DataReport:
    """Counts over one data set, before any rows of it are held out for evaluation.

    rows_read = examples_kept + bad.total + dropped.total. `kind` is pairs; or completions, of which
    `desirable` are desirable; or groups, of which `even` have one score for all; examples_kept counts them too, and
    `answers` what they have together. `bad` and `dropped` count rows by reason and keep the
    first 50 of each. `prompts_cut` counts rows, `answers_cut` single answers, and `boundary_merges`
    rows in which a token straddles the prompt's end. `lengths` are tokens:
    {"prompt" | "chosen" | "rejected" | "longest" | "total": {"p5": int, ..., "max": int}}, where
    longest = prompt + longest answer (what max_length bounds) and total = prompt + all answers; of
    completions they are prompt, completion and total, of groups prompt, completions, longest and total.
    `tokens` are sums: prompt, each answer, scored, total, and separate, which is what goes through the
    model when the prompt is not shared.
    """

    sources: list[str]
    rows_read: int = 0
    examples_kept: int = 0
    held_out: int = 0
    bad: Tally = field(default_factory=Tally)
    dropped: Tally = field(default_factory=Tally)
    prompts_cut: int = 0
    answers_cut: int = 0
    boundary_merges: int = 0
    bos_added: int = 0
    eos_added: int = 0
    ignored_columns: list[str] = field(default_factory=list)
    lengths: dict[str, dict[str, int]] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    kind: str = PAIRS.name
    desirable: int = 0
    even: int = 0
    answers: int = 0

    @property
    def bad_rows(self) -> list[tuple[str, str]]:
        """(where, message) of bad rows, the first 50 of each kind."""
        return list(self.bad)

    def judge(self, row: Mapping[str, Any]) -> None:
        """Counts a kept row's label, or whether its scores are all one."""
        self.desirable += bool(row.get("label"))
        scores = row.get("scores") or ()
        self.even += len(scores) > 0 and min(scores) == max(scores)

    def measure(self, lengths: RowLengths) -> None:
        """Fills `lengths` and `tokens`."""
        prompt, named = lengths.prompt_R, lengths.columns()
        longest = {"longest": prompt + lengths.longest_R} if lengths.compares else {}
        columns = {**named, **longest, "total": prompt + lengths.sums_R}
        self.lengths = {name: _percentiles(values) for name, values in columns.items()}
        sums = {name: int(columns[name].sum()) for name in (*named, "total")}
        again = int((prompt * (lengths.counts_R - 1)).sum())
        scored = sums["total"] - sums["prompt"]
        self.tokens = {**sums, "scored": scored, "separate": sums["total"] + again}

    def notes(self) -> list[str]:
        """Sentences about what was done to the rows, for a reader."""
        facts = (
            (self.prompts_cut, "prompts were cut to fit data.max_length"),
            (self.answers_cut, "answers were cut to fit data.max_length"),
            (
                self.boundary_merges,
                f"{self.kind} have a token across the prompt's end; it is scored",
            ),
            (self.bos_added, "prompts did not have their BOS token; it was put first"),
            (self.eos_added, "answers did not end their turn; EOS was put last"),
            (
                self.even,
                "groups have one score for all their completions; nothing is preferred there",
            ),
            (self.held_out, f"{self.kind} are held out for evaluation"),
        )
        notes = [f"{count} of {self._whole(text)} {text}" for count, text in facts if count]
        if self.ignored_columns:
            notes.append(f"columns not used: {', '.join(self.ignored_columns)}")
        return notes

    def _whole(self, text: str) -> int:
        return self.answers if text.startswith("answers") else self.examples_kept

    @property
    def kept(self) -> str:
        """What is kept, in words."""
        text = f"{self.examples_kept:,} {self.kind} kept"
        told = {
            COMPLETIONS.name: f" ({self.desirable:,} desirable, {self.examples_kept - self.desirable:,} undesirable)",
            GROUPS.name: f" of {self.answers:,} completions",
        }
        return text + told.get(self.kind, "")

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> DataReport:
        """The inverse of to_json."""
        values: dict[str, Any] = json.loads(text)
        for name in ("bad", "dropped"):
            tally = values[name]
            rows = {kind: [tuple(row) for row in rows] for kind, rows in tally["rows"].items()}
            values[name] = Tally(tally["counts"], rows)
        return cls(**values)

    def render(self, console: Any) -> None:
        """Prints the report on a rich console."""
        from dpo_fast.data.preview import render_report

        render_report(self, console)


def _percentiles(values: np.ndarray) -> dict[str, int]:
    if not len(values):
        return {}
    # "higher" gives a length that occurs, and the max at 100.
    return {name: int(np.percentile(values, q, method="higher")) for name, q in PERCENTILES.items()}
