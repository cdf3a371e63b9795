"""Losses that a model's own forward adds to that of its labels, which a preference loss leaves out."""

from __future__ import annotations

from transformers import PretrainedConfig

from dpo_fast.errors import UserError


def check_own_losses(config: PretrainedConfig, remedy: str) -> None:
    """Check that the model's configuration asks for no loss beside the one that is trained.

    `router_aux_loss_coef` alone asks for nothing: transformers adds the balancing loss of the experts only
    where `output_router_logits` is true.

    remedy: how to train without the balancing loss, as the caller's users say it.

    Raises:
        UserError: naming the option of the model's configuration and the remedy.
    """
    for part in (config, config.get_text_config()):
        if getattr(part, "output_router_logits", None):
            raise UserError(
                f"output_router_logits=true in the model's configuration ({part.model_type}) asks for "
                f"the balancing loss of its experts, which is not added to a preference loss yet; {remedy}"
            )
        z_loss = getattr(part, "z_loss_coefficient", None)
        if z_loss:
            raise UserError(
                f"z_loss_coefficient={z_loss} in the model's configuration ({part.model_type}) asks for a "
                "loss on its logits, which are never made; set it to 0 there"
            )
