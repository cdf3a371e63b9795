"""Prompts of the evaluation data as people wrote them, with their chosen answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpo_fast.data.dataset import Dataset
from dpo_fast.data.kinds import COMPLETIONS, DEMONSTRATIONS, GROUPS
from dpo_fast.data.parts import Part, parts_of
from dpo_fast.data.rows import Row, parse_row
from dpo_fast.data.verdicts import BadRow, BadRows, Dropped
from dpo_fast.errors import UserError
from dpo_fast.generation.prompts import Prompt, prompt_of
from dpo_fast.training.config import RunConfig
from dpo_fast.wording import printable


@dataclass(frozen=True)
class HeldOut:
    """A prompt, and the answer that its row prefers as text; None where that is of several turns."""

    prompt: Prompt
    chosen: str | None


def choose_prompts(config: RunConfig, examples: Dataset, count: int, seed: int) -> list[HeldOut]:
    """So many distinct prompts of the evaluation data, chosen by seed. Reads its files again.

    examples: the evaluation split.

    Raises:
        UserError: the rows are no longer where they were.
    """
    wanted, seen = [], set()
    for index in np.random.default_rng(seed).permutation(len(examples)).tolist():
        ids = _before_answer(examples[index])
        if ids not in seen:
            seen.add(ids)
            wanted.append(examples.where(index))
        if len(wanted) == count:
            break
    found = _read(config, set(wanted))
    if missing := [where for where in wanted if where not in found]:
        raise UserError(
            f"{missing[0]}: the row of a held-out prompt is not there any more; leave the data as it was "
            "until the run has begun, or leave generate out"
        )
    return [found[where] for where in wanted]


def _before_answer(example: Mapping[str, Any]) -> tuple[int, ...]:
    """What the last answer of an example follows. Of a conversation it is more than the prompt."""
    flags = example.get("completion_scored")
    if not flags:
        return tuple(example["prompt_ids"])
    start = len(flags)
    while start and flags[start - 1]:
        start -= 1
    return (*example["prompt_ids"], *example["completion_ids"][:start])


def _read(config: RunConfig, wanted: set[str]) -> dict[str, HeldOut]:
    """The prompts of these files and lines."""
    data, found = config.data, {}
    role = "eval" if data.eval is not None else "train"
    for part in parts_of(data, role):
        for where, raw in part.read(BadRows("skip", data.row_bytes)):
            if (place := printable(where)) in wanted:
                found[place] = _held_out(place, raw, part)
                if len(found) == len(wanted):
                    return found
    return found


def _held_out(where: str, raw: Mapping[str, Any], part: Part) -> HeldOut:
    try:
        row = parse_row(where, raw, part.config)
    except (BadRow, Dropped) as verdict:  # it was none when the split was read
        raise UserError(f"{where}: {verdict}; the data have changed since") from None
    try:
        return HeldOut(prompt_of(where, raw, part.config), _chosen(row))
    except (BadRow, Dropped):
        raise UserError(
            f"{where}: nothing comes before its answer, so generate has no prompt to answer: give "
            "data.eval with prompts, or leave generate out"
        ) from None


def _chosen(row: Row) -> str | None:
    """The preferred answer of a row."""
    if row.kind == DEMONSTRATIONS:  # its prompt is what comes before the last answer
        return _text(row.completion if isinstance(row.completion, str) else row.completion[-1:])
    if row.kind == COMPLETIONS:
        return _text(row.completion) if row.label else None
    if row.kind == GROUPS:
        best = max(range(len(row.scores)), key=lambda place: row.scores[place])
        return _text(row.completions[best])
    return _text(row.chosen)


def _text(answer: str | list[dict[str, Any]]) -> str | None:
    """The text of an answer of one turn."""
    if isinstance(answer, str):
        return answer.strip()
    if (
        len(answer) == 1
        and answer[0]["role"] == "assistant"
        and isinstance(answer[0].get("content"), str)
    ):
        return answer[0]["content"]
    return None
