"""Rows of completions and judges for tests."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

from dpo_fast.judging.config import JudgeSection
from dpo_fast.judging.samples import SampleRow, sample_row


def row(*completions: str, place: int = 0, prompt="q", **content) -> SampleRow:
    """A row as it stands in a file."""
    raw = {"prompt": prompt, "completions": list(completions), **content}
    return sample_row(place, f"samples.jsonl:{place + 1}", raw)


def section(**options) -> JudgeSection:
    return JudgeSection(**options)


def write_rows(file: Path, rows: list[dict]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
    return file


def read_rows(file: Path) -> list[dict]:
    with file.open(encoding="utf-8") as lines:  # splitlines() would part more than lines
        return [json.loads(line) for line in lines]


def write_code(file: Path, code: str) -> Path:
    file.write_text(textwrap.dedent(code), encoding="utf-8")
    return file
