"""run.json: when and where a run began and went on, with which versions, and what it is made of."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpo_fast.data.kinds import PAIRS, ExampleLengths
from dpo_fast.durable import write_file
from dpo_fast.ops.cpu import cpuinfo
from dpo_fast.training import distributed
from dpo_fast.training.checkpoints import saving
from dpo_fast.version import __version__

RUN_FACTS = "run.json"
PACKAGES = ("torch", "transformers", "deepspeed", "triton", "peft", "datasets", "tokenizers")
MOST_STARTS = 100  # kept: a run that is preempted all the time has more
BINS = 40


def record_start(
    folder: Path, step: int, lengths: ExampleLengths, made_of: dict[str, Any] | None = None
) -> None:
    """Note that the run begins, or goes on, after `step`. Rank 0 writes.

    made_of: hashes of the data and the weights, for the model card.

    Raises:
        UserError: it cannot be written.
    """
    if not distributed.is_main():
        return
    file = folder / RUN_FACTS
    earlier = _starts(file) if step else []
    content = {"starts": [*earlier, start(step)][-MOST_STARTS:], "lengths": histograms(lengths)}
    content |= {"made_of": made_of} if made_of else {}
    with saving(file):
        write_file(file, json.dumps(content, indent=1))


def _starts(file: Path) -> list[dict]:
    """Those that the file has. One that cannot be read is written anew: nothing depends on it."""
    try:
        return list(json.loads(file.read_text(encoding="utf-8"))["starts"])
    except (OSError, ValueError, KeyError, TypeError):
        return []


def start(step: int) -> dict[str, Any]:
    """One start: the time, the machine of rank 0 and the versions there."""
    return {
        "step": step,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "ranks": distributed.world_size(),
        "device": device_name(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "versions": versions(),
    }


def device_name() -> str:
    """The GPU or the CPU of this rank, as its maker names it."""
    device = distributed.device()
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpuinfo('model name') or platform.machine()}, {distributed.cores()} cores"


def versions() -> dict[str, str]:
    """Of what computes; packages that are not installed are left out."""
    found = {"dpo_fast": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found | ({"cuda": torch.version.cuda} if torch.cuda.is_available() else {})


def histograms(lengths: ExampleLengths) -> dict[str, dict]:
    """Tokens of prompts and of answers: bins from 0 up, `width` wide. The last holds all that are longer.

    Answers of one example have bins in common.
    """
    answers = {"answer": lengths.answers_S}
    if lengths.kind == PAIRS:
        answers = {"chosen": lengths.answers_S[0::2], "rejected": lengths.answers_S[1::2]}
    elif lengths.kind.single:
        answers = {"completion": lengths.answers_S}
    return _binned({"prompt": lengths.prompt_P}) | _binned(answers)


def _binned(columns: dict[str, np.ndarray]) -> dict[str, dict]:
    if not all(map(len, columns.values())):
        return {}
    top = max(np.percentile(column, 99) for column in columns.values())
    width = int(top) // BINS + 1
    return {
        name: {
            "width": width,
            "counts": np.bincount(np.minimum(column // width, BINS), minlength=BINS + 1).tolist(),
            "longest": int(column.max()),
        }
        for name, column in columns.items()
    }
