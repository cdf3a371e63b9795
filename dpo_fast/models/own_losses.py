"""Losses that a model's own forward adds to that of its labels: which are added here, and which refused.

The balancing loss of experts is that of transformers (`load_balancing_loss_func`), of Switch Transformers,
eq. 4 to 6 (Fedus et al. 2021, https://arxiv.org/abs/2101.03961), summed over the K choices of a token.
transformers adds it where `output_router_logits` is true; `router_aux_loss_coef` alone asks for nothing.
"""

from __future__ import annotations

from transformers import PretrainedConfig, PreTrainedModel

from dpo_fast.errors import UserError
from dpo_fast.models.config import ModelSection
from dpo_fast.models.routers import routers_of

# Configurations' names for the weight of the balancing loss; DBRX has the last in its `ffn_config`.
COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef", "moe_loss_weight")
# Mixtures whose routing transformers balances in another way, and why it is not had here.
OTHERWISE = {"doge": "its routers choose rows and columns of a table of experts"}


def balancing_coefficient(section: ModelSection, model: PreTrainedModel) -> float:
    """The weight of the balancing loss: the section's, or what the model's configuration asks for.

    model: loaded or on the meta device, with its configuration as it came.

    Raises:
        UserError: it is asked for and cannot be had, naming option, value and remedy.
    """
    given, config = section.router_aux_loss_coef, model.config
    if given is not None and (given == 0 or section.output_router_logits is False):
        return 0.0
    asked = section.output_router_logits or asks_for_balance(config)
    if given is None and not asked:
        return 0.0
    coefficient = own_coefficient(config) if given is None else given
    told = "model.output_router_logits=true" if given is None else ""
    told = told or f"model.router_aux_loss_coef={given}"
    if coefficient is None:
        raise UserError(
            f"{told} asks for the balancing loss of experts, and the configuration of "
            f"{type(model).__name__} has no coefficient for it: set model.router_aux_loss_coef"
        )
    kind = config.get_text_config().model_type
    obstacle = OTHERWISE.get(kind)
    if obstacle is None and not any(True for _ in routers_of(model)):
        obstacle = "it has no routers of experts that transformers marks"
    if obstacle:
        raise UserError(
            f"{told} cannot be honoured for {type(model).__name__}: {obstacle}; set "
            "model.router_aux_loss_coef=0"
        )
    return float(coefficient)


def asks_for_balance(config: PretrainedConfig) -> bool:
    """Whether a model's configuration asks for the balancing loss."""
    return any(getattr(part, "output_router_logits", None) for part in parts_of(config))


def own_coefficient(config: PretrainedConfig) -> float | None:
    """The weight of the balancing loss that a model's configuration has."""
    parts = [config.get_text_config(), config]
    parts += [getattr(part, "ffn_config", None) for part in parts]
    found = (getattr(part, name, None) for part in parts for name in COEFFICIENTS)
    return next((each for each in found if each is not None), None)


def parts_of(config: PretrainedConfig) -> tuple[PretrainedConfig, ...]:
    """A configuration, and that of its texts, which may be the same."""
    return config, config.get_text_config()


def check_own_losses(config: PretrainedConfig) -> None:
    """Raises UserError if a model's configuration asks for a loss on its logits."""
    for part in parts_of(config):
        z_loss = getattr(part, "z_loss_coefficient", None)
        if z_loss:
            raise UserError(
                f"z_loss_coefficient={z_loss} in the model's configuration ({part.model_type}) asks for a "
                "loss on its logits, which are never made; set it to 0 there"
            )


def check_no_balance(config: PretrainedConfig, remedy: str) -> None:
    """For trainers that do not add the balancing loss: check that the model does not ask for it.

    remedy: how to train without it, as the caller's users say it.

    Raises:
        UserError: it does, naming the option of its configuration and the remedy.
    """
    for part in parts_of(config):
        if getattr(part, "output_router_logits", None):
            raise UserError(
                f"output_router_logits=true in the model's configuration ({part.model_type}) asks for "
                f"the balancing loss of its experts, which this trainer does not add; {remedy}"
            )
