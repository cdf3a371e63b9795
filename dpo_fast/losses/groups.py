"""Losses on groups: two or more completions of one prompt, each with a score; higher is better.

P groups, S completions, T scored tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dpo_fast.losses.divergence import LARGEST_EXPONENT, shaped
from dpo_fast.losses.logps import GroupLogps, spread
from dpo_fast.losses.options import LossOptions
from dpo_fast.losses.spec import ALONE, DIVERGENCE, loss

if TYPE_CHECKING:
    from torch import Tensor

CLIPPED = ("epsilon", "epsilon_high", "scale_rewards", "importance_sampling_level", "grpo_beta")
LEAST_SCALE = 1e-4  # added to a standard deviation of scores, which may be 0


@loss(
    "sum_i log sum_j exp(x_j - x_i) over j = i and all j of lower score, x = beta s(r)",
    "DPO, arXiv 2305.18290 appendix A.3 (Plackett-Luce); of one good and several bad ones S-DPO, "
    "arXiv 2406.09215",
    "rankings of several answers, or several rejected ones; two answers are sigmoid",
    ("beta", *ALONE, *DIVERGENCE),
    kind="groups",
)
def plackett_luce(groups: GroupLogps, options: LossOptions) -> Tensor:
    """[S]; values of a group add up to its loss. Between equal scores neither is preferred."""
    x_S = options.beta * shaped(groups.ratio, options)
    own_SS = torch.eye(len(x_S), dtype=torch.bool, device=x_S.device)
    rivals_SS = score_order(groups.scores, groups.counts) | own_SS
    return x_S.expand_as(rivals_SS).masked_fill(~rivals_SS, -torch.inf).logsumexp(1) - x_S


def clipping(groups: GroupLogps, options: LossOptions) -> dict[str, Tensor]:
    """Which tokens were clipped, and k, under TRL's names; [T] each."""
    log_T = log_weights(groups, options)
    gain_T = groups.to_tokens(advantages(groups, options))
    weight_T = log_T.clamp(max=LARGEST_EXPONENT).exp()
    low = (weight_T < 1 - options.epsilon) & (gain_T < 0)
    high = (weight_T > 1 + options.largest_gain) & (gain_T > 0)
    ratios = {"low": low, "high": high, "region": low | high}
    found = {f"clip_ratio/{name}_mean": values_T.float() for name, values_T in ratios.items()}
    return found | ({"kl": kl_estimate(groups)} if options.grpo_beta else {})


@loss(
    "mean over a completion's tokens of -min(R A, clip(R, 1 - epsilon, 1 + epsilon_high) A) + grpo_beta k, "
    "R = exp(logp - old), A = (score - mean) / (std + 1e-4) within the group, "
    "k = exp(ref - logp) - (ref - logp) - 1",
    "GRPO, arXiv 2402.03300 eq 3; with importance_sampling_level=sequence GSPO, arXiv 2507.18071",
    "answers that the model wrote itself, scored by rules or a reward model",
    CLIPPED,
    kind="groups",
    normaliser="sequences",
    needs_reference=False,
    reference_option="grpo_beta",
    by_token=True,
    watch=clipping,
)
def grpo(groups: GroupLogps, options: LossOptions) -> Tensor:
    return token_sums(clipped(groups, options), groups) / groups.lengths.clamp_min(1)


@loss(
    "as grpo, but all tokens weigh the same: their sum, divided by the scored tokens of the global batch",
    "DAPO, arXiv 2503.14476 eq 8; with scale_rewards=none Dr. GRPO, arXiv 2503.20783, but for a constant",
    "as grpo, where long answers must not count less for each token; epsilon_high is usually 0.28",
    CLIPPED,
    kind="groups",
    normaliser="tokens",
    needs_reference=False,
    reference_option="grpo_beta",
    by_token=True,
    watch=clipping,
)
def dapo(groups: GroupLogps, options: LossOptions) -> Tensor:
    return token_sums(clipped(groups, options), groups)


def advantages(groups: GroupLogps, options: LossOptions) -> Tensor:
    """Scores less their group's mean, [S]; with scale_rewards="group" over its standard deviation."""
    above_S = above_mean(groups.scores, groups.counts)
    if options.scale_rewards == "group":
        spread_P = score_spread(groups.scores, groups.counts)
        above_S = above_S / (spread(spread_P, groups.counts, len(above_S)) + LEAST_SCALE)
    return above_S.to(groups.logps.dtype)


def score_order(scores_S: Tensor, counts_P: Tensor) -> Tensor:
    """bool [S, S]: i and j are in one group, and the score of i is higher."""
    numbers_P = torch.arange(len(counts_P), device=counts_P.device)
    owner_S = spread(numbers_P, counts_P, len(scores_S))
    return (owner_S[:, None] == owner_S) & (scores_S[:, None] > scores_S)


def extremes(scores_S: Tensor, counts_P: Tensor) -> tuple[Tensor, Tensor]:
    """Completions with the highest score in their group and with the lowest, bool [S] each.

    A group whose scores are all equal has neither.
    """
    better_SS = score_order(scores_S, counts_P)
    beaten_S, beats_S = better_SS.any(0), better_SS.any(1)
    return beats_S & ~beaten_S, beaten_S & ~beats_S


def order_kept(values_S: Tensor, scores_S: Tensor, counts_P: Tensor) -> tuple[Tensor, Tensor]:
    """(kept, count), [] each, over any two completions of a group with unequal scores.

    kept: how many of them have their values in the same order, see `preferred`. count: how many there are.
    """
    better_SS = score_order(scores_S, counts_P)
    kept_SS = preferred(values_S[:, None], values_S).double()
    return torch.where(better_SS, kept_SS, 0).sum(), better_SS.sum()


def preferred(x: Tensor, y: Tensor) -> Tensor:
    """1 where x is above y, 0 where it is below, 1/2 where they tie."""
    return (x - y).sign() / 2 + 0.5


def score_spread(scores_S: Tensor, counts_P: Tensor) -> Tensor:
    """Sample standard deviation of the scores in each group, fp64 [P]."""
    squares_S = above_mean(scores_S, counts_P).square()
    return (segments(squares_S, counts_P) / (counts_P - 1).clamp_min(1)).sqrt()


def above_mean(scores_S: Tensor, counts_P: Tensor) -> Tensor:
    """Scores less the mean of their group, fp64 [S]."""
    scores_S = scores_S.double()
    mean_P = segments(scores_S, counts_P) / counts_P.clamp_min(1)
    return scores_S - spread(mean_P, counts_P, len(scores_S))


def log_weights(groups: GroupLogps, options: LossOptions) -> Tensor:
    """log R of every token, [T]: its own, or its completion's mean."""
    assert groups.tokens is not None and groups.old_tokens is not None  # the loss asks for them
    log_T = groups.tokens - groups.old_tokens
    if options.importance_sampling_level == "token":
        return log_T
    return groups.to_tokens(token_sums(log_T, groups) / groups.lengths.clamp_min(1))


def clipped(groups: GroupLogps, options: LossOptions) -> Tensor:
    """The clipped loss of every token, [T]."""
    weight_T = log_weights(groups, options).clamp(max=LARGEST_EXPONENT).exp()
    gain_T = groups.to_tokens(advantages(groups, options))
    low, high = 1 - options.epsilon, 1 + options.largest_gain
    cost_T = -torch.minimum(weight_T * gain_T, weight_T.clamp(low, high) * gain_T)
    return cost_T + options.grpo_beta * kl_estimate(groups) if options.grpo_beta else cost_T


def kl_estimate(groups: GroupLogps) -> Tensor:
    """k, [T]: an estimate of the KL divergence from the reference, never below 0."""
    assert groups.tokens is not None and groups.reference_tokens is not None  # beta asks for them
    log_T = groups.reference_tokens - groups.tokens
    return log_T.clamp(max=LARGEST_EXPONENT).exp() - log_T - 1


def token_sums(values_T: Tensor, groups: GroupLogps) -> Tensor:
    """Sums over the tokens of each completion, [S]."""
    return segments(values_T, groups.lengths)


def segments(values: Tensor, lengths: Tensor) -> Tensor:
    """Sums of consecutive values, added in order and in fp64; in the dtype of the values."""
    sums = torch.segment_reduce(values.double(), "sum", lengths=lengths, unsafe=True)
    return sums.to(values.dtype)
