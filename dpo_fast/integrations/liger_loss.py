"""What the classes of `integrations.liger` share: log-probs of sequences, and a loss of the table on them.

Tensors have the shapes of Liger's interface: input [S, L, D] and target [S, L], of pairs the chosen
sequences first and then the rejected ones.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dpo_fast.losses import PairLogps, SequenceLogps
from dpo_fast.modules.losses import check_lengths
from dpo_fast.modules.objective import ObjectiveModule
from dpo_fast.modules.scored_rows import scored_rows
from dpo_fast.ops.integers import as_int64
from dpo_fast.ops.linear_logp.dtensor import plain_weight
from dpo_fast.ops.linear_logp.op import linear_logp
from dpo_fast.ops.segments import sum_sequences


@dataclass(frozen=True)
class Settings:
    """Arguments that Liger's constructors have in common, and ours.

    ignore_index: labels that are not scored.
    average_log_prob: means over tokens in the place of sums.
    compiled, chunk_size: how Liger runs; without effect here.
    implementation, workspace_bytes: as in `linear_logp`.
    """

    ignore_index: int
    average_log_prob: bool
    compiled: bool
    chunk_size: int
    implementation: str
    workspace_bytes: int | None


class ScoredSequences(NamedTuple):
    """What the head says of S sequences.

    logps_S: sums of their log-probs; means with `average_log_prob`.
    lengths_S: their scored tokens.
    nll: mean over chosen tokens, []; 0 of none.
    """

    logps_S: Tensor
    lengths_S: Tensor
    nll: Tensor


class LigerLoss(ObjectiveModule):
    """A loss of the table, by name, on sequences that are scored from hidden states.

    Its attributes are those of Liger's class, and may be set (`ObjectiveModule`).
    """

    use_ref_model = False

    def __init__(self, name: str, options: dict, settings: Settings) -> None:
        super().__init__(name, options=options)
        self.ignore_index, self.average_log_prob = settings.ignore_index, settings.average_log_prob
        self.compiled, self.chunk_size = settings.compiled, settings.chunk_size
        self.implementation = settings.implementation
        self.workspace_bytes = settings.workspace_bytes

    def mean_loss(self, logps: PairLogps | SequenceLogps) -> Tensor:
        """Over pairs, else over sequences, []; 0 of none, where Liger has nan."""
        losses = self.objective.specs[0].function(logps, self.objective.options)
        return losses.sum() / max(len(losses), 1)

    def _tokens(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, rows_T, targets_T):
        """Log-probabilities of these targets, [T]."""
        rows_TD, weight, bias = in_one_dtype(hidden.flatten(0, -2)[rows_T], weight, bias)
        return linear_logp(
            rows_TD,
            weight,
            targets_T,
            bias=bias,
            implementation=self.implementation,
            workspace_bytes=self.workspace_bytes,
        ).logp

    def score(
        self,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None,
        nll_target: Tensor | None = None,
    ) -> ScoredSequences:
        """Score the sequences. nll_target: labels of the nll where they differ from `target`."""
        if hidden.dim() != 3 or hidden.shape[:2] != target.shape:
            raise ValueError(
                f"expected input [S, L, D] and target [S, L]; got {tuple(hidden.shape)} and "
                f"{tuple(target.shape)}"
            )
        target = as_int64(target, "target")
        rows = scored_rows(target, ignore_index=self.ignore_index)
        only_nll, counted_N = self._only_nll(target, nll_target)
        targets = nll_target.flatten()[only_nll] if len(only_nll) else only_nll
        both = torch.cat([rows.rows_T, only_nll]), torch.cat([rows.targets_T, targets])
        sizes = len(rows.rows_T), len(only_nll)
        logp_T, nll_logp = self._tokens(hidden, weight, bias, *both).split(sizes)
        in_nll_T = counted_N[rows.rows_T]
        total = torch.where(in_nll_T, logp_T, 0).sum() + nll_logp.sum()
        logps_S = sum_sequences(logp_T, rows.lengths_S)
        check_lengths(self.objective, rows.lengths_S)
        if self.average_log_prob:
            _check_scored(rows.lengths_S)
            logps_S = logps_S / rows.lengths_S
        count = (in_nll_T.sum() + len(only_nll)).clamp_min(1)
        return ScoredSequences(logps_S, rows.lengths_S, -total / count)

    def _only_nll(self, target: Tensor, nll_target: Tensor | None) -> tuple[Tensor, Tensor]:
        """Rows that the nll alone scores, int64, and a mask of rows that it shares, [N]; N = S L."""
        chosen = torch.zeros_like(target, dtype=torch.bool)
        chosen[: len(target) // 2] = True
        if nll_target is None:
            return target.new_empty(0), chosen.flatten()
        if nll_target.shape != target.shape:
            raise ValueError(
                f"nll_target is {tuple(nll_target.shape)}; expected the shape of target, "
                f"{tuple(target.shape)}"
            )
        nll_target = as_int64(nll_target, "nll_target")
        counted = chosen & (nll_target != self.ignore_index)
        same = nll_target == target
        more = (counted & ~same).flatten().nonzero().squeeze(1)
        return more, (counted & same).flatten()

    @torch.no_grad()
    def reference(self, target, hidden, weight, bias) -> Tensor | None:
        """The reference's log-probabilities, [S]; None where it is not used."""
        check_reference(self.use_ref_model, hidden, weight, bias)
        return self.score(hidden, weight, target, bias).logps_S if self.use_ref_model else None


class LigerPairLoss(LigerLoss):
    """A loss on pairs, and alpha * nll."""

    def __init__(
        self, name: str, options: dict, settings: Settings, *, alpha: float, compute_nll_loss: bool
    ) -> None:
        super().__init__(name, options, settings)
        self.alpha, self.compute_nll_loss = alpha, compute_nll_loss

    def pair_loss(
        self, weight, hidden, target, bias, reference_S=None, nll_target=None
    ) -> tuple[Tensor, tuple[Tensor, ...], PairLogps]:
        """Loss, Liger's tuple for pairs, and the pairs."""
        if len(target) % 2:
            raise ValueError(
                f"{len(target)} sequences are no pairs: give all chosen ones, then all rejected ones"
            )
        if nll_target is not None and not self.compute_nll_loss:
            raise ValueError("compute_nll_loss=False uses no nll_target; leave it out")
        weight, bias = (plain_weight(x, hidden) for x in (weight, bias))  # once, for two readers
        scored = self.score(hidden, weight, target, bias, nll_target)
        # A mean is the sum of a completion of length 1 to losses that divide by lengths.
        lengths_S = torch.ones_like(scored.lengths_S) if self.average_log_prob else scored.lengths_S
        reference = (None, None) if reference_S is None else reference_S.chunk(2)
        pairs = PairLogps(*scored.logps_S.chunk(2), *lengths_S.chunk(2), *reference)
        nll = scored.nll if self.compute_nll_loss else torch.zeros_like(scored.nll)
        loss = self.mean_loss(pairs) + self.alpha * nll
        half = len(hidden) // 2
        logits = (mean_logit(side, weight, bias) for side in (hidden[:half], hidden[half:]))
        rewards = (
            self.beta * ratio.detach() for ratio in (pairs.chosen_ratio, pairs.rejected_ratio)
        )
        outputs = (pairs.chosen.detach(), pairs.rejected.detach(), *logits, nll.detach(), *rewards)
        return loss, outputs, pairs


@torch.no_grad()
def mean_logit(hidden: Tensor, weight: Tensor, bias: Tensor | None, total: bool = False) -> Tensor:
    """Mean (or sum) of all logits of these rows, masked ones too, [] fp32.

    It is the logit of the mean row at the mean column, so no logits are made.
    """
    rows, V = hidden.reshape(-1, hidden.shape[-1]), len(weight)
    count = max(len(rows), 1)
    row_D = rows.sum(0, dtype=torch.float32) / count
    mean = (row_D * weight.mean(0, dtype=torch.float32)).sum()  # autocast would round a product
    if bias is not None:
        mean = mean + bias.mean(dtype=torch.float32)
    return mean * (len(rows) * V) if total else mean


def in_one_dtype(*operands: Tensor | None) -> tuple[Tensor | None, ...]:
    """Hidden states, weight and bias in the widest of their dtypes: Liger takes mixtures, such as a head
    in fp32 over a backbone of 16 bits."""
    given = [x.dtype for x in operands if x is not None]
    if not all(dtype.is_floating_point for dtype in given):
        return operands
    dtype = functools.reduce(torch.promote_types, given)
    return tuple(None if x is None else x.to(dtype) for x in operands)


def _check_scored(lengths_S: Tensor) -> None:
    """Raises ValueError for a sequence without scored tokens, whose mean would be nan, and the loss."""
    if not torch.compiler.is_compiling() and (lengths_S <= 0).any():
        raise ValueError(
            f"average_log_prob=True divides by lengths, and sequence {int(lengths_S.argmin())} has no "
            "scored token: leave the example out, or set it to False"
        )


def check_reference(use_ref_model: bool, hidden, weight, bias) -> None:
    """Raises ValueError unless a reference's head is given exactly if it is used."""
    wanted = [x is not None for x in (hidden, weight)]
    if not all(wanted) if use_ref_model else any([*wanted, bias is not None]):
        raise ValueError(
            f"use_ref_model={use_ref_model}, ref_input is {given(hidden)}, ref_weight is "
            f"{given(weight)}, ref_bias is {given(bias)}: a reference needs ref_input and "
            "ref_weight, and without use_ref_model=True none is used"
        )


def given(value: Tensor | None) -> str:
    return "None" if value is None else "given"
