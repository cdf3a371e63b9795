"""What losses are functions of: log-probabilities of completions, and counts of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class PairLogps:
    """P pairs. Each field is [P]; log-probabilities are sums over a completion's tokens, in fp32.

    chosen_lengths, rejected_lengths: scored tokens.
    reference_chosen, reference_rejected: None where no reference is used.
    margin, soft_label: columns of the data, or None.
    delta, kl: as in `SequenceLogps`.
    plain_chosen: for the sft term, the chosen sums without token_clamp and ld_alpha; None where they
        equal `chosen`.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor
    reference_chosen: Tensor | None = None
    reference_rejected: Tensor | None = None
    margin: Tensor | None = None
    soft_label: Tensor | None = None
    delta: Tensor | None = None
    kl: Tensor | None = None
    plain_chosen: Tensor | None = None

    @property
    def likelihood(self) -> Tensor:
        """Plain sums of the chosen completions, [P]."""
        return self.chosen if self.plain_chosen is None else self.plain_chosen

    @property
    def chosen_ratio(self) -> Tensor:
        """a = lw - rw, [P]; lw where there is no reference."""
        reference = self.reference_chosen
        return self.chosen if reference is None else self.chosen - reference

    @property
    def rejected_ratio(self) -> Tensor:
        """b = ll - rl, [P]; ll where there is no reference."""
        reference = self.reference_rejected
        return self.rejected if reference is None else self.rejected - reference

    @property
    def sequences(self) -> SequenceLogps:
        """The same completions one by one: chosen ones desirable, rejected ones undesirable."""

        def interleaved(chosen: Any, rejected: Any) -> Any:  # of what is None: None
            return None if chosen is None else torch.stack([chosen, rejected], 1).flatten()

        desirable = torch.ones_like(self.chosen, dtype=torch.bool)
        return SequenceLogps(
            interleaved(self.chosen, self.rejected),
            interleaved(self.chosen_lengths, self.rejected_lengths),
            interleaved(desirable, ~desirable),
            interleaved(self.reference_chosen, self.reference_rejected),
            self.kl,
            self.delta,
        )


class _WithRatio:
    """What has `logps` and perhaps a `reference`, [S]."""

    logps: Tensor
    reference: Tensor | None

    @property
    def ratio(self) -> Tensor:
        """r, [S]: log-ratio to the reference; the log-probability where there is none."""
        return self.logps if self.reference is None else self.logps - self.reference


@dataclass(frozen=True)
class SequenceLogps(_WithRatio):
    """S completions that are desirable or undesirable by themselves; log-probabilities as in `PairLogps`.

    logps, lengths, reference: [S].
    desirable: bool [S].
    kl: estimate of the policy's distance from the reference (KTO), [], or None for 0.
    delta: running mean of rewards (BCO), [], or None for 0.
    plain: for the sft term, the sums without token_clamp; None where they equal `logps`.
    """

    logps: Tensor
    lengths: Tensor
    desirable: Tensor
    reference: Tensor | None = None
    kl: Tensor | None = None
    delta: Tensor | None = None
    plain: Tensor | None = None

    @property
    def likelihood(self) -> Tensor:
        """Plain sums of the desirable completions, 0 for the others, [S]."""
        plain = self.logps if self.plain is None else self.plain
        return torch.where(self.desirable, plain, torch.zeros_like(plain))


@dataclass(frozen=True)
class GroupLogps(_WithRatio):
    """S completions in P groups, one group after the other; log-probabilities as in `PairLogps`.

    logps, lengths, scores: [S].
    counts: int64 [P], completions of each group.
    reference: [S] or None.
    tokens, old_tokens, reference_tokens: log-probabilities of every token, [T], of the policy, of the model
        that wrote the completions, and of the reference; None where no loss needs tokens.
    """

    logps: Tensor
    lengths: Tensor
    scores: Tensor
    counts: Tensor
    reference: Tensor | None = None
    tokens: Tensor | None = None
    old_tokens: Tensor | None = None
    reference_tokens: Tensor | None = None

    def to_tokens(self, values_S: Tensor) -> Tensor:
        """Each token its completion's value, [T]."""
        assert self.tokens is not None  # who asks for tokens has them
        return spread(values_S, self.lengths, len(self.tokens))


def spread(values: Tensor, counts: Tensor, total: int) -> Tensor:
    """Each value repeated `counts` times, `total` in all. Waits for nothing on a GPU."""
    return values.repeat_interleave(counts, output_size=total)


Logps = PairLogps | SequenceLogps | GroupLogps
