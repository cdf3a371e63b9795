"""Whether two tiles of a product kernel gave the same results, but for rounding.

The search for tiles and the benchmarks ask it: a tile that a compiler gets wrong may be the fastest.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

ALIKE = 1e-3  # nats, or powers of two: the same products added in another order
STORED_ROWS = 128  # of a stored tile, compared entry by entry; of the others their sums


class Results(NamedTuple):
    """What a launch wrote.

    values: by name, a tensor and the size of its entries; two tiles may differ by ALIKE of that size.
    stored: [T, V] of exponentials or gradients, or None.
    size_T: what the absolute values of a row of `stored` add up to, or a bound of it.
    """

    values: dict[str, tuple[Tensor, Tensor]]
    stored: Tensor | None = None
    size_T: Tensor | None = None


def evidence(results: Results) -> dict[str, tuple[Tensor, Tensor]]:
    """Copies of the results and how far another tile's may be from them, by name.

    Of a stored tile: the sum of every row, and some rows from the first to the last. Such a row's
    differences are added up, and may reach two units in the last place of each entry.
    """
    found = {name: (x.clone(), ALIKE * size) for name, (x, size) in results.values.items()}
    stored = results.stored
    if stored is not None:
        slack_T = (ALIKE + 2 * torch.finfo(stored.dtype).eps) * results.size_T
        some = torch.linspace(0, len(stored) - 1, min(len(stored), STORED_ROWS)).long()
        some = some.to(stored.device)
        found["sums of stored rows"] = stored.sum(1, dtype=torch.float32), slack_T
        found["stored rows"] = stored[some], slack_T[some]
    return found


def difference(
    found: dict[str, tuple[Tensor, Tensor]], expected: dict[str, tuple[Tensor, Tensor]]
) -> str | None:
    """What of `found` is further from `expected` than it allows, in words. NaN is like nothing."""
    for name, (wanted, slack) in expected.items():
        got = found[name][0]
        gap = torch.where(got == wanted, 0.0, (got.float() - wanted.float()).abs())
        if gap.ndim == 2:
            gap = gap.sum(1)
        wrong = ~(gap <= slack)
        if wrong.any():
            worst = gap[wrong].max().item()
            return f"{name}: {int(wrong.sum())} of {len(gap)} differ, by up to {worst:.2g}"
    return None
