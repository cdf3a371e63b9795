"""From TRL's default to our fastest step, one ingredient at a time: how much each is worth.

A factor is the time before over the time after, so that all of them multiply to the whole.
"""

from __future__ import annotations

from dataclasses import dataclass

# What changes on the way to the next contender.
CHAIN = (
    ("", "trl"),
    ("no checkpointing", "trl, no checkpointing"),
    ("stored reference", "trl, precomputed, no checkpointing"),
    ("head and the rest of the step", "dpo_fast padded, cached"),
    ("no padding", "dpo_fast packed, cached"),
    ("each prompt once", "dpo_fast shared_prefix, cached"),
)
SPLIT = "head and the rest of the step"


@dataclass(frozen=True)
class Ingredient:
    """A factor of the whole, and the seconds of a step after it. The first of a list is the start: its name
    is the contender's, its factor 1."""

    name: str
    factor: float
    seconds: float


def ingredients(rows: list[dict]) -> list[Ingredient]:
    """The start, and what makes it faster, in order; [] without two contenders of the chain. Where one is
    missing, the ingredients on both sides of it are one."""
    timed = {row["impl"]: row for row in rows if row["s_p50"] != ""}
    before, names, found = None, [], []
    for name, impl in CHAIN:
        names.append(name)
        if impl not in timed:
            continue
        row = timed[impl]
        if before is None:
            found.append(Ingredient(impl, 1.0, row["s_p50"]))
        elif names == [SPLIT]:
            found += _head_and_rest(before, row)
        else:
            told = " + ".join(part for part in names if part)
            found.append(Ingredient(told, before["s_p50"] / row["s_p50"], row["s_p50"]))
        before, names = row, []
    return found if len(found) > 1 else []


def _head_and_rest(before: dict, after: dict) -> list[Ingredient]:
    """The step with our head in it would take so much; what is left is the rest of the trainer."""
    saved = before["head_share"] * before["s_p50"] - after["head_share"] * after["s_p50"]
    between = before["s_p50"] - saved
    return [
        Ingredient("head", before["s_p50"] / between, between),
        Ingredient("rest of the step", between / after["s_p50"], after["s_p50"]),
    ]


def token_factors(rows: list[dict]) -> dict[str, float]:
    """Positions of a padded step over its tokens, and tokens over those with every prompt once."""
    padded = next(
        (row for row in rows if row["layout"] == "padded" and row["computed_tokens"]), None
    )
    factors = {"repeated prompts": rows[0]["data_tokens"] / rows[0]["once_tokens"]}
    if padded:
        factors = {"padding": padded["computed_tokens"] / padded["data_tokens"]} | factors
    return factors
