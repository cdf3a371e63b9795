"""Rows that are here and can be counted: what a share of them, or an epoch, is in numbers."""

from __future__ import annotations

import math
import os

from pydantic import ValidationError

from dpo_fast.data.config import DataConfig
from dpo_fast.data.parts import parts_of
from dpo_fast.data.verdicts import BadRows
from dpo_fast.errors import UserError
from dpo_fast.migration.draft import Draft

MOST_ROWS = 5_000_000  # beyond that nobody waits for a count


def rows_of(draft: Draft) -> int | None:
    """The rows of data.train; None where they are not files on this machine, or cannot be read."""
    tree = draft.tree().get("data", {})
    entries = tree.get("train")
    entries = entries if isinstance(entries, list) else [entries]
    paths = [each["path"] if isinstance(each, dict) else each for each in entries]
    if not all(
        isinstance(path, str) and os.path.exists(os.path.expanduser(path)) for path in paths
    ):
        return None
    if any(isinstance(each, dict) and each.get("weight") for each in entries):
        return None  # an epoch of weighted sources is another number
    keys = ("train", "format", "columns", "max_rows", "group_pairs")
    try:
        config = DataConfig(**{key: tree[key] for key in keys if key in tree})
        count = 0
        for part in parts_of(config, "train"):
            for _ in part.read(BadRows("skip")):
                count += 1
                if count > MOST_ROWS:
                    return None
    except (UserError, ValidationError, OSError):
        return None  # `data` and `train` tell what is wrong
    return count or None


def put_held_out(draft: Draft, name: str) -> None:
    """data.eval_rows, given as rows or, below 1, as a share of them."""
    size = float(draft[name] or 0)
    if size >= 1:
        draft.put("data.eval_rows", int(size), name)
    elif size > 0:
        rows = rows_of(draft)
        if rows is None:
            draft.lose(
                name, f"{100 * size:g} % of the rows: set data.eval_rows to a number of them"
            )
        else:
            draft.put(
                "data.eval_rows", math.ceil(size * rows), name, comment=f"{size:g} of {rows:,} rows"
            )


def steps_of_epoch(draft: Draft) -> int | None:
    """Optimiser steps of an epoch, where the rows are counted. Comes after data and batch sizes."""
    rows = rows_of(draft)
    if rows is None or "train.global_batch_size" not in draft.keys:
        return None
    held = draft.keys.get("data.eval_rows")
    left = rows - (held.value if held else 0)
    return max(math.ceil(left / draft.keys["train.global_batch_size"].value), 1)


def put_per_epoch(draft: Draft, name: str, key: str, times: float, remedy: str) -> bool:
    """Something that is done so many times an epoch, in steps. Returns whether the steps are known."""
    steps = steps_of_epoch(draft)
    if steps is None:
        draft.lose(
            name,
            f"{remedy}: set {key} to steps, of which dpo-fast train --dry-run tells the number",
        )
        return False
    draft.put(
        key, max(round(steps / times), 1), name, comment=f"{name}; an epoch has {steps:,} steps"
    )
    return True
