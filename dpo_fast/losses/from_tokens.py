"""`preference`: from token log-probabilities to the loss, sequence sums and rewards."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpo_fast.errors import UnavailableError
from dpo_fast.losses.fused import check_sequences, fused_preference
from dpo_fast.losses.logps import GroupLogps, PairLogps, SequenceLogps
from dpo_fast.losses.objective import Objective, Totals
from dpo_fast.losses.sums import Tokens, policy_weights, sequence_sums
from dpo_fast.ops.dispatch import choose_implementation
from dpo_fast.ops.integers import as_int64
from dpo_fast.ops.segments import sum_sequences

logger = logging.getLogger("dpo_fast")
UNPAIRED = "unpaired completions"
KERNEL_OPTIONS = ("beta", "label_smoothing", "length_average")


class Preference(NamedTuple):
    """fp32.

    loss: [], differentiable. The others are not.
    logps_S, rewards_S: log-probabilities and implicit rewards of sequences.
    watched: values by name, whose means are plotted beside the loss.
    """

    loss: Tensor
    logps_S: Tensor
    rewards_S: Tensor
    watched: Mapping[str, Tensor] = MappingProxyType({})


class ScoredGroups(NamedTuple):
    """P groups of completions, one group after the other.

    scores_S: fp32 [S], higher is better.
    counts_P: int64 (or other integers) [P], completions of each group.
    old_T: fp32 [T], log-probs of the tokens under the model that wrote them, or None.
    """

    scores_S: Tensor
    counts_P: Tensor
    old_T: Tensor | None = None


def preference(
    logp_T: Tensor,
    lengths_S: Tensor,
    reference_S: Tensor | None,
    objective: Objective,
    totals: Totals,
    *,
    reference_T: Tensor | None = None,
    log_sum_p2_T: Tensor | None = None,
    columns: Mapping[str, Tensor] | None = None,
    desirable_S: Tensor | None = None,
    groups: ScoredGroups | None = None,
    statistics: Mapping[str, Tensor] | None = None,
    implementation: str = "auto",
) -> Preference:
    """The share of this batch in the loss of the global batch, and what metrics need.

    Args:
        logp_T: [T] fp32 (or fp64), log-probabilities of scored tokens, any stride.
        lengths_S: [S] int64 (or other integers), tokens of each sequence, contiguous in T. Of pair p
            sequence 2p is the chosen and 2p + 1 the rejected one. A length may be 0, and so may S.
        reference_S: [S] fp32, the reference's log-probabilities, or None where no loss needs them.
        objective: the weighted losses.
        totals: counts of the global batch, which losses are divided by.
        reference_T: [T], the reference's tokens, for `ld_alpha`, `token_clamp` and `grpo_beta`.
        log_sum_p2_T: [T], the head's extra of that name, for `use_weighting`.
        columns: of the data, fp32 [P], of labelled completions [S]: any of `weight`, `margin`,
            `soft_label`.
        desirable_S: bool [S]. With it sequences are desirable or undesirable by themselves, not pairs.
        groups: with it sequences are groups of scored completions.
        statistics: `kl`, `delta`, [] each, estimated over all ranks; 0 if missing.
        implementation: `torch` is the definition, operation by operation; `triton` is one kernel;
            `auto` takes the kernel on a GPU if it computes all that is asked.

    Returns:
        `Preference`, with rewards as `Objective.rewards` defines them.

    Raises:
        ValueError: shapes, dtypes or lengths that do not fit; an input that a loss needs is missing, or
            one that no loss uses is given.
        UnavailableError: the named implementation cannot run here, or cannot do these losses.
    """
    columns, statistics = columns or {}, statistics or {}
    lengths_S = as_int64(lengths_S, "lengths")
    if groups is not None:
        groups = groups._replace(counts_P=as_int64(groups.counts_P, "counts"))
    paired = desirable_S is None and groups is None and not objective.grouped
    check_sequences(logp_T, lengths_S, reference_S, paired=paired)
    _check_inputs(objective, reference_S, columns, desirable_S)
    _check_groups(objective, groups, logp_T, lengths_S, reference_T)
    pairs = len(lengths_S) // 2 if paired else 0 if groups is None else len(groups.counts_P)
    # A compiler does not know how many tokens are scored: some, then.
    scored = 1 if torch.compiler.is_compiling() else len(logp_T)
    objective.check_totals(totals, pairs=pairs, sequences=len(lengths_S), tokens=scored)
    columns = {name: values.float() for name, values in columns.items()}
    extra = (*columns, *(() if paired else (UNPAIRED,)))
    # A compiler would trace through the cache, and warn.
    choose = _implementation.__wrapped__ if torch.compiler.is_compiling() else _implementation
    name = choose(objective, extra, logp_T.device, logp_T.dtype, implementation)
    if name == "torch":
        tokens = Tokens(logp_T, lengths_S, reference_S, reference_T, log_sum_p2_T)
        if groups is not None:
            return _of_groups(tokens, objective, totals, columns, groups)
        return _composed(tokens, objective, totals, columns, desirable_S, statistics)
    options = {option: getattr(objective.options, option) for option in KERNEL_OPTIONS}
    loss, logps_S, rewards_S = fused_preference(
        logp_T, lengths_S, reference_S, objective.names, objective.coefficients(totals), **options
    )
    return Preference(loss, logps_S, objective.scaled(rewards_S, lengths_S))


def _composed(tokens: Tokens, objective, totals, columns, desirable_S, statistics) -> Preference:
    options, weight = objective.options, columns.get("weight")
    logps_S, reference_S = sequence_sums(tokens, options, paired=desirable_S is None)
    logps: PairLogps | SequenceLogps
    if desirable_S is None:
        logps = as_pairs(logps_S, tokens.lengths_S, reference_S, columns, statistics)
        if options.changes_sums:
            plain_S = sum_sequences(tokens.logp_T, tokens.lengths_S)
            logps = replace(logps, plain_chosen=plain_S.view(-1, 2)[:, 0])
    else:
        logps = SequenceLogps(
            logps_S,
            tokens.lengths_S,
            desirable_S,
            reference_S,
            statistics.get("kl"),
            statistics.get("delta"),
            sum_sequences(tokens.logp_T, tokens.lengths_S) if options.changes_sums else None,
        )
    if options.use_weighting:
        own = policy_weights(tokens, options).view(-1, 2).prod(1)
        if options.weighting_clamp is not None:
            own = own.clamp(max=options.weighting_clamp)
        weight = own if weight is None else own * weight
    loss = objective(logps, totals, weight)
    return Preference(loss, logps_S.detach(), objective.rewards(logps), objective.watched(logps))


def _of_groups(tokens: Tokens, objective, totals, columns, groups: ScoredGroups) -> Preference:
    logps_S, reference_S = sequence_sums(tokens, objective.options, paired=False)
    logps = GroupLogps(
        logps_S,
        tokens.lengths_S,
        groups.scores_S,
        groups.counts_P,
        reference_S,
        tokens.logp_T,
        groups.old_T,
        tokens.reference_T,
    )
    loss = objective(logps, totals, columns.get("weight"))
    return Preference(loss, logps_S.detach(), objective.rewards(logps), objective.watched(logps))


def as_pairs(
    logps_S: Tensor,
    lengths_S: Tensor,
    reference_S: Tensor | None,
    columns: Mapping[str, Tensor] | None = None,
    statistics: Mapping[str, Tensor] | None = None,
) -> PairLogps:
    """Pairs from sequences that are chosen and rejected in turn."""
    columns, statistics = columns or {}, statistics or {}

    def sides(values: Any) -> Any:
        return (None, None) if values is None else values.view(-1, 2).unbind(1)

    chosen, rejected = sides(logps_S)
    chosen_lengths, rejected_lengths = sides(lengths_S)
    reference_chosen, reference_rejected = sides(reference_S)
    return PairLogps(
        chosen,
        rejected,
        chosen_lengths,
        rejected_lengths,
        reference_chosen,
        reference_rejected,
        margin=columns.get("margin"),
        soft_label=columns.get("soft_label"),
        delta=statistics.get("delta"),
        kl=statistics.get("kl"),
    )


def _check_inputs(objective: Objective, reference_S, columns, desirable_S) -> None:
    if reference_S is None and objective.needs_reference:
        raise ValueError(f"losses {objective.names} need a reference; reference_S is None")
    if desirable_S is not None:
        objective.check_single("desirable_S was given instead")
    objective.check_inputs(columns)


def _check_groups(
    objective: Objective, groups: ScoredGroups | None, logp_T, lengths_S, reference_T
) -> None:
    if groups is None:
        if objective.grouped:
            raise ValueError(f"losses {objective.names} need groups: scores and counts")
        return
    if not objective.grouped:
        raise ValueError(f"losses {objective.names} do not take groups; groups was given")
    scores_S, counts_P, old_T = groups
    if scores_S.shape != lengths_S.shape or counts_P.dim() != 1:
        raise ValueError(
            f"scores are {tuple(scores_S.shape)}, counts {tuple(counts_P.shape)}; expected "
            f"({len(lengths_S)},), a score for each completion, and [P]"
        )
    _check_values(scores_S, counts_P, waits=not (logp_T.is_cuda or torch.compiler.is_compiling()))
    needed = {
        "old_T, the log-probs that the completions were written with": (
            objective.needs_old_tokens,
            old_T,
        ),
        "reference_T, the reference's log-prob of every token": (
            objective.needs_reference_tokens,
            reference_T,
        ),
    }
    for name, (wanted, values_T) in needed.items():
        if wanted and (values_T is None or values_T.shape != logp_T.shape):
            raise ValueError(f"losses {objective.names} need {name}: [T], here ({len(logp_T)},)")


def _check_values(scores_S: Tensor, counts_P: Tensor, waits: bool) -> None:
    """waits: whether the host may look at the values."""
    total, negative = counts_P.sum(), (counts_P < 0).any()
    finite = scores_S.isfinite().all()
    if not waits:
        message = (
            "counts must add up to the completions, and none be below 0; scores must be finite"
        )
        torch._assert_async((total == len(scores_S)) & ~negative & finite, message)
    elif total != len(scores_S) or negative:
        raise ValueError(
            f"counts add up to {total.item()}; there are {len(scores_S)} completions, and no count may be "
            "below 0"
        )
    elif not finite:
        raise ValueError(f"scores must be finite; got {scores_S[~scores_S.isfinite()][0].item()}")


def kernel_misses(objective: Objective, extra: Iterable[str] = ()) -> list[str]:
    """What the kernel does not compute of this, in words; empty if it computes all.

    extra: names of columns, or in words what else comes with the batch.
    """
    missing = [f"the loss {spec.name}" for spec in objective.specs if not spec.kernel]
    missing += [name for name in objective.options.changed if name not in KERNEL_OPTIONS]
    return missing + [f"the column {name}" if " " not in name else name for name in extra]


@functools.cache
def _implementation(
    objective: Objective,
    extra: tuple[str, ...],
    device: torch.device,
    dtype: torch.dtype,
    requested: str,
) -> str:
    missing = kernel_misses(objective, extra)
    if missing and requested in ("auto", "triton"):
        reason = f"the kernel does not compute {', '.join(missing)}"
        if requested == "triton":
            raise UnavailableError(f"implementation='triton' cannot run preference: {reason}")
        if not torch.compiler.is_compiling():
            logger.info("preference on %s in %s: torch (%s)", device, dtype, reason)
        return "torch"
    return choose_implementation("preference", device, dtype, requested).name
