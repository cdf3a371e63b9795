"""What a run has logged."""

import json
from pathlib import Path


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def series(folder: Path, name: str = "loss") -> dict[int, float]:
    """A metric by step, of the lines that have it."""
    return {line["step"]: line[name] for line in lines_of(folder) if name in line}
