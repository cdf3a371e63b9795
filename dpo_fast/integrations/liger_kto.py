"""The interface of Liger's `LigerFusedLinearKTOLoss`, with ours behind it."""

from __future__ import annotations

import torch
from torch import Tensor

from dpo_fast.integrations.liger_loss import LigerLoss, Settings, mean_logit
from dpo_fast.losses import SequenceLogps
from dpo_fast.modules.losses import check_desirable
from dpo_fast.ops.linear_logp.dtensor import plain_weight


class LigerFusedLinearKTOLoss(LigerLoss):
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
            {"beta": beta},
            Settings(
                ignore_index,
                average_log_prob,
                compiled,
                chunk_size,
                implementation,
                workspace_bytes,
            ),
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
            _input, lin_weight, target, bias and the reference's: as for `LigerFusedLinearDPOLoss`.
            preference_labels: bool [S], true for desirable completions.
            kl: of the policy from the reference, one number or [S]; None is 0.
        """
        desirable_S = preference_labels
        if desirable_S is None:
            raise ValueError("preference_labels=None; expected a bool for each sequence")
        check_desirable(desirable_S, len(target), "preference_labels")
        if kl is not None and kl.numel() != 1 and kl.shape != desirable_S.shape:
            raise ValueError(f"kl is {tuple(kl.shape)}; expected one number, or ({len(target)},)")
        reference_S = self.reference(target, ref_input, ref_weight, ref_bias)
        lin_weight, bias = (plain_weight(x, _input) for x in (lin_weight, bias))
        scored = self.score(_input, lin_weight, target, bias)
        logps = SequenceLogps(scored.logps_S, scored.lengths_S, desirable_S, reference_S, kl)
        rewards_S = self.beta * logps.ratio.detach()
        sums = [
            torch.where(mask_S, values_S, 0).sum()
            for values_S in (logps.logps.detach(), rewards_S)
            for mask_S in (desirable_S, ~desirable_S)
        ]
        logits = [
            mean_logit(_input[mask_S], lin_weight, bias, total=True)
            for mask_S in (desirable_S, ~desirable_S)
        ]
        return self.mean_loss(logps), (*sums[:2], *logits, *sums[2:])
