"""Which examples a run will draw, in which order: known before its first step, as samplers are exact."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dpo_fast.references.blocks import ends
from dpo_fast.training.splits import Split


@dataclass(frozen=True)
class Drawn:
    """The examples that a run asks for. Rows of the same tokens are one example, the first that is drawn.

    order_P: places of examples, as the first steps of any run with this sampler draw them: those of this
        run, and as many behind them as fill its last block. Without steps all examples.
    wanted_P: bool [P], the rows of this run; None: all.
    """

    order_P: np.ndarray
    wanted_P: np.ndarray | None = None


def drawn(split: Split) -> Drawn:
    """What the steps of a split will ask for (`Split.steps`). Every rank finds the same."""
    codes_P = split.examples.digests.dictionary_encode().indices.to_numpy()
    count, sampler, steps = int(codes_P.max()) + 1, split.sampler, split.steps
    last = sampler.steps_per_epoch if steps is None else steps.stop
    seen, wanted = np.zeros(count, bool), np.zeros(count, bool)  # by code
    order: list[int] = []
    step, enough = 0, count
    while len(order) < enough:
        if step == last:
            enough = next(end for end in ends() if end >= len(order))
        if step >= last and (len(order) >= enough or step % sampler.steps_per_epoch == 0):
            break  # what is behind the last step fills its block, as far as the epoch goes
        batch = sampler.global_batch(step)
        codes = codes_P[batch].tolist()
        if steps is not None and step in steps:
            wanted[codes] = True
        for place, code in zip(batch, codes):
            if not seen[code]:
                seen[code] = True
                order.append(place)
        step += 1
    if steps is None:
        rest, first = np.unique(codes_P, return_index=True)
        return Drawn(np.array([*order, *np.sort(first[~seen[rest]])], np.int64))
    for later in range(max(step, steps.start), steps.stop):
        if wanted.all():
            break
        wanted[codes_P[sampler.global_batch(later)]] = True
    return Drawn(np.array(order[:enough], np.int64), wanted[codes_P])
