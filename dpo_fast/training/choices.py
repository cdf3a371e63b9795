"""Layout and attention of a run: chosen once, from the options and the architectures that meet in it."""

from __future__ import annotations

from dataclasses import dataclass

from dpo_fast.models.architecture import (
    Architecture,
    Choice,
    choose_attention,
    choose_layout,
    read_architecture,
)
from dpo_fast.models.load import DTYPES
from dpo_fast.training import distributed
from dpo_fast.training.config import RunConfig


@dataclass(frozen=True)
class Choices:
    """What a run uses. The reference may be of another architecture, with an attention of its own."""

    layout: Choice
    attention: Choice
    reference_attention: Choice

    def applied(self, config: RunConfig) -> RunConfig:
        """The configuration with the layout that was chosen in place of `auto`."""
        train = config.train.model_copy(update={"layout": self.layout.name})
        return config.model_copy(update={"train": train})


def choose(config: RunConfig, option: str = "reference.path") -> Choices:
    """Decide from configuration files alone; no weight is read. option: which names the reference.

    Raises:
        UserError: an option that cannot be honoured for the policy or the reference, with the remedy.
    """
    policy = read_architecture(config.model)
    reference = policy
    if config.reference.path is not None:
        section = config.model.model_copy(update={"path": config.reference.path})
        reference = read_architecture(section, option)
    # Both score the same batches, so the layout is one that both allow.
    layouts = [choose_layout(config.train.layout, each) for each in (policy, reference)]
    layout = next((choice for choice in layouts if choice.name == "padded"), layouts[0])
    attention = [_attention(config, layout, each) for each in (policy, reference)]
    return Choices(layout, *attention)


def _attention(config: RunConfig, layout: Choice, architecture: Architecture) -> Choice:
    return choose_attention(
        config.model.attention,
        layout.name,
        distributed.device(),
        DTYPES[config.model.dtype],
        architecture,
    )
