"""`preference`: from token log-probabilities to the loss, sequence sums and rewards."""

from __future__ import annotations

import functools
import logging
from typing import NamedTuple

import torch
from torch import Tensor

from dpo_fast.errors import UnavailableError
from dpo_fast.losses.objective import Objective, Totals
from dpo_fast.losses.table import LOSSES, PairLogps
from dpo_fast.ops.implementation import choose_implementation
from dpo_fast.ops.preference import check_sequences, fused_preference, sum_sequences

logger = logging.getLogger("dpo_fast")


class Preference(NamedTuple):
    """fp32. `loss`, [], is differentiable; log-probabilities and rewards of sequences, [S], are not."""

    loss: Tensor
    logps_S: Tensor
    rewards_S: Tensor


def preference(
    logp_T: Tensor,
    lengths_S: Tensor,
    reference_S: Tensor | None,
    objective: Objective,
    totals: Totals,
    *,
    implementation: str = "auto",
) -> Preference:
    """The share of these pairs in the loss of the global batch, and what metrics need of them.

    Args:
        logp_T: [T] fp32 (or fp64), log-probabilities of scored tokens, any stride.
        lengths_S: [S] int64, tokens of each sequence, contiguous in T: 2p is the chosen and 2p + 1
            the rejected one of pair p. A length may be 0, and so may S.
        reference_S: [S] fp32, the reference's log-probabilities, or None where no loss needs them.
        objective, totals: the weighted losses, and the counts that they are divided by.
        implementation: `torch` is the definition, operation by operation; `triton` is one kernel;
            `auto` takes the kernel on a GPU if it computes every loss of the objective.

    Returns:
        `Preference`; its rewards are beta times the log-ratios (the log-probabilities themselves
        without a reference).

    Raises:
        ValueError: shapes, dtypes or lengths that do not fit, or no reference where one is needed.
        UnavailableError: the named implementation cannot run here, or cannot do these losses.
    """
    check_sequences(logp_T, lengths_S, reference_S)
    if reference_S is None and objective.needs_reference:
        raise ValueError(f"losses {objective.names} need a reference; reference_S is None")
    name = _implementation(objective.names, logp_T.device, logp_T.dtype, implementation)
    if name == "torch":
        return _composed(logp_T, lengths_S, reference_S, objective, totals)
    return Preference(
        *fused_preference(
            logp_T, lengths_S, reference_S, objective.names, objective.coefficients(totals),
            **vars(objective.options),
        )
    )  # fmt: skip


def _composed(logp_T, lengths_S, reference_S, objective: Objective, totals: Totals) -> Preference:
    logps_S = sum_sequences(logp_T, lengths_S)
    pairs = as_pairs(logps_S, lengths_S, reference_S)
    rewards_S = torch.stack(objective.rewards(pairs), 1).flatten()
    return Preference(objective(pairs, totals), logps_S.detach(), rewards_S)


def as_pairs(logps_S: Tensor, lengths_S: Tensor, reference_S: Tensor | None) -> PairLogps:
    """Columns of chosen and rejected, [P] each, from those of sequences, [S]."""
    columns = [
        (None, None) if x is None else x.view(-1, 2).unbind(1)
        for x in (logps_S, lengths_S, reference_S)
    ]
    return PairLogps(*columns[0], *columns[1], *columns[2])


@functools.cache
def _implementation(
    names: tuple[str, ...], device: torch.device, dtype: torch.dtype, requested: str
) -> str:
    missing = [name for name in names if not LOSSES[name].kernel]
    if missing and requested in ("auto", "triton"):
        reason = f"the kernel does not compute the loss {', '.join(missing)}"
        if requested == "triton":
            raise UnavailableError(f"implementation='triton' cannot run preference: {reason}")
        logger.info("preference on %s in %s: torch (%s)", device, dtype, reason)
        return "torch"
    return choose_implementation("preference", device, dtype, requested).name
