"""The fused linear preference losses of liger-kernel 0.8.5, under their names, behind its interface:

    from dpo_fast.integrations.liger import LigerFusedLinearDPOLoss

Constructor, call and returned tuple are those of `liger_kernel.chunked_loss`, and so are the values, up to
rounding. What differs:

- Log-probabilities are fp32 from fp32 logits, also for 16-bit inputs; masked rows are not multiplied.
- What Liger leaves out without a word is honoured, or an error: label_smoothing with loss_type="sigmoid"
  is cDPO, and with "hinge" and others that have none it is a ValueError; the reference that use_ref_model
  asks for has to be there, and one that it does not ask for must not.
- `chunk_size` and `compiled` are how Liger runs; they change nothing here. `implementation` and
  `workspace_bytes`, ours, are as in `dpo_fast.linear_logp`.
- kl of KTO may be one number, or one for each row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpo_fast.losses import LOSSES, LossOptions, Objective, PairLogps, SequenceLogps
from dpo_fast.losses.reference_free import log1mexp
from dpo_fast.modules.rows import scored_rows
from dpo_fast.ops.linear_logp import linear_logp
from dpo_fast.ops.segments import sum_sequences

DPO_LOSSES = tuple(
    name
    for name, spec in LOSSES.items()
    if spec.paired and spec.needs_reference and not spec.needs_columns
)


class _Scores(NamedTuple):
    """Log-probabilities of sequences, [B], their tokens, [B], and the mean nll of chosen tokens, []."""

    logps_B: Tensor
    lengths_B: Tensor
    nll: Tensor


class _Loss(nn.Module):
    """What the five have in common: a loss of the table, and how sequences are scored."""

    def __init__(
        self,
        name: str,
        options: LossOptions,
        ignore_index: int,
        average_log_prob: bool,
        compiled: bool,
        chunk_size: int,
        implementation: str,
        workspace_bytes: int | None,
    ) -> None:
        super().__init__()
        self.objective = Objective((name,), (1.0,), options)  # it refuses options not used
        self.ignore_index, self.average_log_prob = ignore_index, average_log_prob
        self.compiled, self.chunk_size = compiled, chunk_size
        self.implementation, self.workspace_bytes = implementation, workspace_bytes

    @property
    def beta(self) -> float:
        return self.objective.options.beta

    def _losses(self, rows: PairLogps | SequenceLogps) -> Tensor:
        return self.objective.specs[0].function(rows, self.objective.options)

    def _tokens(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, rows_T, targets_T):
        return linear_logp(
            hidden.flatten(0, -2)[rows_T],
            weight,
            targets_T,
            bias=bias,
            implementation=self.implementation,
            workspace_bytes=self.workspace_bytes,
        ).logp

    def _score(
        self,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None,
        nll_target: Tensor | None = None,
    ) -> _Scores:
        if hidden.dim() != 3 or hidden.shape[:2] != target.shape:
            raise ValueError(
                f"expected input [B, L, D] and target [B, L]; got {tuple(hidden.shape)} and "
                f"{tuple(target.shape)}"
            )
        rows = scored_rows(target, ignore_index=self.ignore_index)
        more_E, counted_N = self._only_nll(target, nll_target)
        targets_E = nll_target.flatten()[more_E] if len(more_E) else more_E
        both = torch.cat([rows.rows_T, more_E]), torch.cat([rows.targets_T, targets_E])
        logp_T, logp_E = self._tokens(hidden, weight, bias, *both).split(
            [len(rows.rows_T), len(more_E)]
        )
        in_nll_T = counted_N[rows.rows_T]
        total = torch.where(in_nll_T, logp_T, 0).sum() + logp_E.sum()
        logps_B = sum_sequences(logp_T, rows.lengths_S)
        if self.average_log_prob:
            logps_B = logps_B / rows.lengths_S
        return _Scores(logps_B, rows.lengths_S, -total / (in_nll_T.sum() + len(more_E)))

    def _only_nll(self, target: Tensor, nll_target: Tensor | None) -> tuple[Tensor, Tensor]:
        """Flat rows that only the nll scores, int64 [E], and a mask of those that it shares, [B L]."""
        chosen = torch.zeros_like(target, dtype=torch.bool)
        chosen[: len(target) // 2] = True
        if nll_target is None:
            return target.new_empty(0), chosen.flatten()
        if nll_target.shape != target.shape:
            raise ValueError(
                f"nll_target is {tuple(nll_target.shape)}; expected the shape of target, "
                f"{tuple(target.shape)}"
            )
        counted = chosen & (nll_target != self.ignore_index)
        same = nll_target == target
        more = (counted & ~same).flatten().nonzero().squeeze(1)
        return more, (counted & same).flatten()

    @torch.no_grad()
    def _reference(self, target, hidden, weight, bias) -> Tensor | None:
        """The reference's log-probabilities, [B]; None where it is not used."""
        wanted = [x is not None for x in (hidden, weight)]
        if not all(wanted) if self.use_ref_model else any([*wanted, bias is not None]):
            raise ValueError(
                f"use_ref_model={self.use_ref_model}, ref_input is {_given(hidden)}, ref_weight is "
                f"{_given(weight)}, ref_bias is {_given(bias)}: a reference needs ref_input and "
                "ref_weight, and without use_ref_model=True none is used"
            )
        return self._score(hidden, weight, target, bias).logps_B if self.use_ref_model else None

    def extra_repr(self) -> str:
        return f"{self.objective.names[0]}, {self.objective.options}"


class _PairLoss(_Loss):
    """alpha * nll + a loss on pairs: chosen rows first, then the rejected ones."""

    def __init__(self, *arguments, alpha: float, compute_nll_loss: bool, **rest) -> None:
        super().__init__(*arguments, **rest)
        self.alpha, self.compute_nll_loss = alpha, compute_nll_loss

    def _forward(
        self, weight, hidden, target, bias, reference_B=None, nll_target=None
    ) -> tuple[Tensor, tuple[Tensor, ...], PairLogps]:
        if len(target) % 2:
            raise ValueError(f"a batch of {len(target)} rows is no pairs: chosen, then rejected")
        if nll_target is not None and not self.compute_nll_loss:
            raise ValueError("compute_nll_loss=False uses no nll_target; leave it out")
        scores = self._score(hidden, weight, target, bias, nll_target)
        # A mean is the sum of a completion of length 1 to losses that divide by lengths.
        lengths_B = torch.ones_like(scores.lengths_B) if self.average_log_prob else scores.lengths_B
        reference = (None, None) if reference_B is None else reference_B.chunk(2)
        pairs = PairLogps(*scores.logps_B.chunk(2), *lengths_B.chunk(2), *reference)
        nll = scores.nll if self.compute_nll_loss else torch.zeros_like(scores.nll)
        loss = self._losses(pairs).mean() + self.alpha * nll
        half = len(hidden) // 2
        logits = (mean_logit(side, weight, bias) for side in (hidden[:half], hidden[half:]))
        rewards = (
            self.beta * ratio.detach() for ratio in (pairs.chosen_ratio, pairs.rejected_ratio)
        )
        outputs = (pairs.chosen.detach(), pairs.rejected.detach(), *logits, nll.detach(), *rewards)
        return loss, outputs, pairs


class LigerFusedLinearDPOLoss(_PairLoss):
    """DPO and its variants. `loss_type` is any loss on pairs with a reference of
    `dpo_fast.losses.LOSSES` that needs no column of the data; Liger has ten of them.

    Raises:
        ValueError: a loss_type or an option that cannot be honoured.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        compute_nll_loss: bool = False,
        compiled: bool = True,
        use_ref_model: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        discopop_tau: float = 0.05,
        *,
        implementation: str = "auto",
        workspace_bytes: int | None = None,
    ) -> None:
        if loss_type not in DPO_LOSSES:
            raise ValueError(f"loss_type={loss_type!r}: choose from {', '.join(DPO_LOSSES)}")
        if loss_type == "exo_pair" and label_smoothing == 0:
            raise ValueError("label_smoothing=0.0: exo_pair takes its logarithm; set it to 1e-3")
        super().__init__(
            loss_type,
            LossOptions(beta, label_smoothing, discopop_tau=discopop_tau),
            ignore_index,
            average_log_prob,
            compiled,
            chunk_size,
            implementation,
            workspace_bytes,
            alpha=alpha,
            compute_nll_loss=compute_nll_loss,
        )
        self.use_ref_model = use_ref_model

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Loss, and (chosen_logps, rejected_logps, chosen_logits_mean, rejected_logits_mean, nll_loss,
        chosen_rewards, rejected_rewards), detached; P = B / 2 pairs.

        Args:
            lin_weight: [V, D]. _input: [B, L, D], chosen rows first. bias: [V] or None.
            target: int64 [B, L], shifted already: row l predicts target[b, l].
            ref_input, ref_weight, ref_bias: those of the reference, its hidden size may differ.
        """
        reference_B = self._reference(target, ref_input, ref_weight, ref_bias)
        return self._forward(lin_weight, _input, target, bias, reference_B)[:2]


class LigerFusedLinearORPOLoss(_PairLoss):
    """ORPO: nll + beta times the odds-ratio loss, on mean log-probabilities."""

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        chunk_size: int = 1,
        *,
        implementation: str = "auto",
        workspace_bytes: int | None = None,
    ) -> None:
        super().__init__(
            "orpo",
            LossOptions(beta),
            ignore_index,
            True,
            compiled,
            chunk_size,
            implementation,
            workspace_bytes,
            alpha=1.0,
            compute_nll_loss=compute_nll_loss,
        )

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        nll_target: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Loss, and the tuple of DPO with (log_odds_ratio, log_odds_chosen), [] each, at its end.

        nll_target: int64 [B, L], labels of the nll where they are others than `target`; of the chosen
        rows, the first half. Rows that both score alike are multiplied once.
        """
        loss, outputs, pairs = self._forward(
            lin_weight, _input, target, bias, nll_target=nll_target
        )
        with torch.no_grad():
            p, q = pairs.chosen, pairs.rejected
            odds = (p - q) - (log1mexp(p) - log1mexp(q))
        return loss, (*outputs, F.logsigmoid(odds).mean(), odds.mean())


class LigerFusedLinearCPOLoss(_PairLoss):
    """CPO: alpha * nll + sigmoid loss of beta times the margin of log-probabilities."""

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        *,
        implementation: str = "auto",
        workspace_bytes: int | None = None,
    ) -> None:
        super().__init__(
            "cpo",
            LossOptions(beta, label_smoothing),
            ignore_index,
            average_log_prob,
            compiled,
            chunk_size,
            implementation,
            workspace_bytes,
            alpha=alpha,
            compute_nll_loss=compute_nll_loss,
        )

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """As of `LigerFusedLinearDPOLoss`, without a reference."""
        return self._forward(lin_weight, _input, target, bias)[:2]


class LigerFusedLinearSimPOLoss(_PairLoss):
    """SimPO: sigmoid loss of beta times the margin of mean log-probabilities, less gamma; + alpha * nll."""

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        gamma: float = 0.5,
        chunk_size: int = 1,
        *,
        implementation: str = "auto",
        workspace_bytes: int | None = None,
    ) -> None:
        super().__init__(
            "simpo",
            LossOptions(beta, label_smoothing, simpo_gamma=gamma),
            ignore_index,
            True,
            compiled,
            chunk_size,
            implementation,
            workspace_bytes,
            alpha=alpha,
            compute_nll_loss=compute_nll_loss,
        )

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """As of `LigerFusedLinearDPOLoss`, without a reference."""
        return self._forward(lin_weight, _input, target, bias)[:2]


class LigerFusedLinearKTOLoss(_Loss):
    """KTO: completions that are desirable or undesirable by themselves, in any order."""

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compiled: bool = True,
        use_ref_model: bool = False,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        *,
        implementation: str = "auto",
        workspace_bytes: int | None = None,
    ) -> None:
        super().__init__(
            "kto",
            LossOptions(beta),
            ignore_index,
            average_log_prob,
            compiled,
            chunk_size,
            implementation,
            workspace_bytes,
        )
        self.use_ref_model = use_ref_model

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        preference_labels: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        kl: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Loss, and (chosen_logps_sum, rejected_logps_sum, chosen_logits_sum, rejected_logits_sum,
        chosen_rewards_sum, rejected_rewards_sum), [] each, detached.

        Args:
            _input, lin_weight, target, bias and the reference's: as of `LigerFusedLinearDPOLoss`.
            preference_labels: bool [B], true for good completions.
            kl: of the policy from the reference, one number or [B]; None is 0.
        """
        desirable_B = preference_labels
        if (
            desirable_B is None
            or desirable_B.dtype != torch.bool
            or desirable_B.shape != target.shape[:1]
        ):
            raise ValueError(
                f"preference_labels={'None' if desirable_B is None else desirable_B.dtype}; expected torch.bool "
                f"({len(target)},)"
            )
        if kl is not None and kl.numel() != 1 and kl.shape != desirable_B.shape:
            raise ValueError(f"kl is {tuple(kl.shape)}; expected one number, or ({len(target)},)")
        reference_B = self._reference(target, ref_input, ref_weight, ref_bias)
        scores = self._score(_input, lin_weight, target, bias)
        rows = SequenceLogps(scores.logps_B, scores.lengths_B, desirable_B, reference_B, kl)
        rewards_B = self.beta * rows.ratio.detach()
        sums = [
            x for values in (rows.logps.detach(), rewards_B) for x in _by_side(values, desirable_B)
        ]
        logits = [
            mean_logit(_input[mask], lin_weight, bias, total=True)
            for mask in (desirable_B, ~desirable_B)
        ]
        return self._losses(rows).mean(), (*sums[:2], *logits, *sums[2:])


@torch.no_grad()
def mean_logit(hidden: Tensor, weight: Tensor, bias: Tensor | None, total: bool = False) -> Tensor:
    """Mean (or sum) of all logits of these rows, masked ones too, [] fp32: the logit of the mean row at the
    mean column, so that no logits are made."""
    rows, V = hidden.reshape(-1, hidden.shape[-1]), len(weight)
    count = max(len(rows), 1)
    row_D = rows.sum(0, dtype=torch.float32) / count
    mean = (row_D * weight.mean(0, dtype=torch.float32)).sum()  # autocast would round a product
    if bias is not None:
        mean = mean + bias.mean(dtype=torch.float32)
    return mean * (len(rows) * V) if total else mean


def _by_side(values_B: Tensor, desirable_B: Tensor) -> tuple[Tensor, Tensor]:
    zero = values_B.new_zeros(())
    return torch.where(desirable_B, values_B, zero).sum(), torch.where(
        desirable_B, zero, values_B
    ).sum()


def _given(value: Tensor | None) -> str:
    return "None" if value is None else "given"
