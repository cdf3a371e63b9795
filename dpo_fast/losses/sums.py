"""From token log-probabilities to the sums that losses see, under the options that change sums."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dpo_fast.losses.options import LossOptions
from dpo_fast.ops.segments import sum_sequences


class Tokens(NamedTuple):
    """Scored tokens of S sequences, one sequence after the other.

    logp_T: fp32 (or fp64) [T].
    lengths_S: int64 [S].
    reference_S: sums of the reference, or None.
    reference_T: its tokens, for options that need them.
    log_sum_p2_T: log sum_v p_v^2 of each token (the head's extra), for `use_weighting`.
    """

    logp_T: Tensor
    lengths_S: Tensor
    reference_S: Tensor | None = None
    reference_T: Tensor | None = None
    log_sum_p2_T: Tensor | None = None


def sequence_sums(
    tokens: Tokens, options: LossOptions, paired: bool
) -> tuple[Tensor, Tensor | None]:
    """Sums over tokens of the policy and of the reference (or None), [S] each.

    token_clamp bounds logp_t - reference_t. ld_alpha weights the tokens of a pair's longer answer that lie
    beyond the shorter one's length (arXiv 2409.06411 eq 7).

    Raises:
        ValueError: reference tokens are needed and missing, or ld_alpha without pairs.
    """
    logp_T, lengths_S, reference_S, reference_T, _ = tokens
    if options.reference_free:
        reference_S = reference_T = None
    if options.needs_reference_tokens and reference_T is None and reference_S is not None:
        raise ValueError(
            "loss.token_clamp and loss.ld_alpha need the reference's log-prob of every token: set "
            "reference.per_token=true, or loss.ld_reference=false"
        )
    if options.token_clamp is not None and reference_T is not None:
        bound = options.token_clamp
        logp_T = reference_T + (logp_T - reference_T).clamp(-bound, bound)
    if options.ld_alpha is not None:
        if not paired:
            raise ValueError("loss.ld_alpha compares the lengths of a pair's answers: give pairs")
        weight_T = tail_weights(lengths_S, options.ld_alpha, len(logp_T), logp_T.dtype)
        logp_T = logp_T * weight_T
        if reference_T is not None and options.ld_reference:
            reference_T = reference_T * weight_T
    if reference_T is not None and options.needs_reference_tokens:
        reference_S = sum_sequences(reference_T, lengths_S)
    return sum_sequences(logp_T, lengths_S), reference_S


def tail_weights(lengths_S: Tensor, alpha: float, total: int, dtype: torch.dtype) -> Tensor:
    """1 for the first min(nw, nl) tokens of a sequence, alpha for the later ones, [T].

    total: T; told, since adding up the lengths would wait for a GPU.
    """
    shorter_S = lengths_S.view(-1, 2).amin(1).repeat_interleave(2)
    start_S = lengths_S.cumsum(0) - lengths_S
    place_T = torch.arange(total, device=lengths_S.device) - start_S.repeat_interleave(
        lengths_S, output_size=total
    )
    tail_T = place_T >= shorter_S.repeat_interleave(lengths_S, output_size=total)
    return torch.where(tail_T, alpha, 1.0).to(dtype)


@torch.no_grad()
def policy_weights(tokens: Tokens, options: LossOptions) -> Tensor:
    """exp(mean_t[logp_t - log sum_v p_tv^2]), [S] (WPO, arXiv 2406.11827 eq 2).

    About 1 for what the policy itself would sample. A pair's weight is the product of both.

    Raises:
        ValueError: `log_sum_p2_T` is missing.
    """
    if tokens.log_sum_p2_T is None:
        raise ValueError("loss.use_weighting=true needs the extra log_sum_p2 of every scored token")
    aligned_T = tokens.logp_T.detach() - tokens.log_sum_p2_T
    mean_S = sum_sequences(aligned_T, tokens.lengths_S) / tokens.lengths_S.clamp_min(1)
    return mean_S.exp()
