"""Which completions are written together, and with which seed: a function of prompts and options alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

LARGEST_SEED = 2**63


@dataclass(frozen=True)
class Batch:
    """Completions that are written together.

    number: of the batch. seed: of its draws. members: (place of the prompt, number of its completion).
    """

    number: int
    seed: int
    members: tuple[tuple[int, int], ...]


def batches_of(
    lengths: Sequence[int], generations: int, size: int, seed: int, alike: bool = False
) -> list[Batch]:
    """Batches of `size` completions of prompts of like length, from the longest to the shortest.

    lengths: tokens of each prompt. generations: completions of each.
    alike: all prompts of a batch have the same length.
    """
    order = sorted(range(len(lengths)), key=lambda place: (-lengths[place], place))
    members = [(place, number) for place in order for number in range(generations)]
    groups: list[list[tuple[int, int]]] = []
    for member in members:
        last = groups[-1] if groups else []
        full = not last or len(last) == size
        if full or (alike and lengths[last[0][0]] != lengths[member[0]]):
            groups.append([])
        groups[-1].append(member)
    return [Batch(n, seed_of(seed, n), tuple(group)) for n, group in enumerate(groups)]


def seed_of(*numbers: int) -> int:
    """A seed below 2**63 that nearby numbers do not share a stream with."""
    text = "/".join(map(str, numbers)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") % LARGEST_SEED
