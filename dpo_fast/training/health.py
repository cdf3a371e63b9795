"""Checks of a run that costs one forward: is the reference the policy that training starts from?"""

from __future__ import annotations

import torch

from dpo_fast.data.batch import ScoredBatch
from dpo_fast.errors import UserError
from dpo_fast.losses import Totals
from dpo_fast.training import distributed
from dpo_fast.training.forward import LossPass, of_tokens

TOLERANCE = {"fp32": 1e-6, "bf16": 1e-3}


@torch.no_grad()
def check_start(
    engine, batch: ScoredBatch, loss_pass: LossPass, provider, totals: Totals, dtype: str
) -> tuple[float, float]:
    """Loss of the first step's batch before any update, and what it must be: ln 2 for sigmoid.

    What it must be is the same loss with the policy's own log-probabilities as the reference, so it
    holds for any loss. The tolerance (1e-6 in fp32, 1e-3 in bf16) grows with the loss itself.

    Raises:
        UserError: they differ, which means that the reference is not the policy at its start.
    """
    batch = batch.to(engine.device)
    reference = loss_pass.reference(provider, batch)
    token_outputs = loss_pass.token_outputs(engine, batch)
    own = reference | of_tokens(token_outputs["logp"], batch)
    losses = [loss_pass.loss(token_outputs, each, batch, totals).loss for each in (reference, own)]
    values = torch.stack(losses).double()
    if distributed.world_size() > 1:
        torch.distributed.all_reduce(values)
    loss, expected = values.tolist()
    if not abs(loss - expected) <= TOLERANCE[dtype] * max(1.0, abs(expected)):
        raise UserError(
            f"before the first update the loss is {loss:.7f} and should be {expected:.7f}, because "
            "policy and reference are the same model there. Look at reference.cache_dir (a reference of "
            "another model?), at dropout or other noise in the model's forward, and at model.dtype"
        )
    return loss, expected
