"""The interface of liger-kernel 0.8.5's fused linear losses, with ours behind it:

    from dpo_fast.integrations.liger import LigerFusedLinearDPOLoss

Constructor, call and returned tuple are those of `liger_kernel.chunked_loss`, and so are the values, up to
rounding. What differs:

- Log-probabilities are fp32 from fp32 logits, also for 16-bit inputs. Masked rows are not multiplied.
- Options that Liger ignores are honoured, or an error. label_smoothing with loss_type="sigmoid" is cDPO;
  with a loss that has none, such as "hinge", it is a ValueError. A reference must be given exactly if
  use_ref_model asks for one.
- `compiled` changes nothing, nor does `chunk_size` in losses of preferences. `implementation` and
  `workspace_bytes` are ours, as in `dpo_fast.linear_logp`.
- Attributes have Liger's names. What is set later is checked by the next call, as in the constructor.
- kl of KTO may be one number, or one for each sequence. Labels may have any dtype of integers.
- Where Liger gives nan there is none: no sequences are a loss of 0, the nll of no tokens is 0, and a mean
  over a sequence without scored tokens is a ValueError.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_fast.integrations.liger_distillation import (
    LigerFusedLinearCosineSimilarityLoss,
    LigerFusedLinearJSDLoss,
)
from dpo_fast.integrations.liger_grpo import LigerFusedLinearGRPOLoss
from dpo_fast.integrations.liger_kto import LigerFusedLinearKTOLoss
from dpo_fast.integrations.liger_loss import LigerPairLoss, Settings
from dpo_fast.losses import LOSSES, Objective
from dpo_fast.losses.reference_free import log_odds
from dpo_fast.modules.objective import setting

__all__ = [
    "LigerFusedLinearCPOLoss",
    "LigerFusedLinearCosineSimilarityLoss",
    "LigerFusedLinearDPOLoss",
    "LigerFusedLinearGRPOLoss",
    "LigerFusedLinearJSDLoss",
    "LigerFusedLinearKTOLoss",
    "LigerFusedLinearORPOLoss",
    "LigerFusedLinearSimPOLoss",
]
DPO_LOSSES = tuple(
    name
    for name, spec in LOSSES.items()
    if spec.paired and spec.needs_reference and not spec.needs_columns
)


class LigerFusedLinearDPOLoss(LigerPairLoss):
    """DPO and its variants.

    loss_type: any loss of `dpo_fast.losses.LOSSES` on pairs that compares with a reference and needs no
        column of the data; Liger has ten of them.

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
        super().__init__(
            loss_type,
            {"beta": beta, "label_smoothing": label_smoothing, "discopop_tau": discopop_tau},
            Settings(
                ignore_index,
                average_log_prob,
                compiled,
                chunk_size,
                implementation,
                workspace_bytes,
            ),
            alpha=alpha,
            compute_nll_loss=compute_nll_loss,
        )
        self.use_ref_model = use_ref_model

    def check_objective(self, objective: Objective) -> None:
        (name,) = objective.names
        if name not in DPO_LOSSES:
            raise ValueError(f"loss_type={name!r}: choose from {', '.join(DPO_LOSSES)}")

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
        chosen_rewards, rejected_rewards), detached; P = S / 2 pairs.

        Args:
            lin_weight: [V, D].
            _input: [S, L, D], all chosen sequences and then all rejected ones.
            target: integers [S, L], shifted already: position l predicts target[s, l].
            bias: [V] or None.
            ref_input, ref_weight, ref_bias: the reference's; its hidden size may differ.
        """
        reference_S = self.reference(target, ref_input, ref_weight, ref_bias)
        return self.pair_loss(lin_weight, _input, target, bias, reference_S)[:2]


class LigerFusedLinearORPOLoss(LigerPairLoss):
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
            {"beta": beta},
            Settings(ignore_index, True, compiled, chunk_size, implementation, workspace_bytes),
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

        nll_target: integers [S, L], labels of the nll where they differ from `target`. The nll is of the
            chosen sequences, the first half. Positions with the same label in both are scored once.
        """
        loss, outputs, pairs = self.pair_loss(
            lin_weight, _input, target, bias, nll_target=nll_target
        )
        with torch.no_grad():
            odds_P = log_odds(pairs, self.objective.options)["log_odds"]
        return loss, (*outputs, F.logsigmoid(odds_P).mean(), odds_P.mean())


class LigerFusedLinearCPOLoss(LigerPairLoss):
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
            {"beta": beta, "label_smoothing": label_smoothing},
            Settings(
                ignore_index,
                average_log_prob,
                compiled,
                chunk_size,
                implementation,
                workspace_bytes,
            ),
            alpha=alpha,
            compute_nll_loss=compute_nll_loss,
        )

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """As `LigerFusedLinearDPOLoss`, without a reference."""
        return self.pair_loss(lin_weight, _input, target, bias)[:2]


class LigerFusedLinearSimPOLoss(LigerPairLoss):
    """SimPO: sigmoid loss of beta times the margin of mean log-probabilities, less gamma; + alpha * nll."""

    gamma = setting("simpo_gamma")

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
            {"beta": beta, "label_smoothing": label_smoothing, "simpo_gamma": gamma},
            Settings(ignore_index, True, compiled, chunk_size, implementation, workspace_bytes),
            alpha=alpha,
            compute_nll_loss=compute_nll_loss,
        )

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """As `LigerFusedLinearDPOLoss`, without a reference."""
        return self.pair_loss(lin_weight, _input, target, bias)[:2]
