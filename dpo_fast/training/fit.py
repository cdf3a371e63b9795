"""Whether model, tokenizer and data belong together.

Layout and attention of a run: chosen once, from the options and the architectures that meet in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from dpo_fast.data.layouts import LAYOUTS
from dpo_fast.errors import UserError
from dpo_fast.models import ScoringModel
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
from dpo_fast.training.splits import Split


def check_vocabulary(
    model: ScoringModel, tokenizer: PreTrainedTokenizerBase, option: str = "model.path"
) -> None:
    """Raises UserError if the tokenizer makes ids that the model has no row for. option: names it."""
    rows = model.causal_lm.config.get_text_config().vocab_size
    if len(tokenizer) > rows:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens, the model a vocabulary of {rows}: they do not "
            f"belong together; check {option} and model.tokenizer"
        )


def check_positions(model: ScoringModel, splits: Iterable[Split]) -> None:
    """Longer sequences than the model has positions for would index past a table, or mean nothing.

    Raises:
        UserError: there are such; or sequences so long that longrope, which goes by the longest of a
            batch, would give the others of their batch other log-probs than they have elsewhere.
    """
    config = model.causal_lm.config.get_text_config()
    longest = max(split.longest for split in splits)
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and longest > limit:
        raise UserError(
            f"the longest sequence has {longest} tokens, but the model has {limit} positions "
            f"(max_position_embeddings); set data.max_length={limit} or less"
        )
    switch = min(_longrope_switches(config), default=longest)
    if longest > switch:
        raise UserError(
            f"the longest sequence has {longest} tokens; beyond {switch} "
            "(original_max_position_embeddings) longrope changes the positions of every sequence in the "
            "batch, so that log-probs would depend on what shares a batch and a stored reference would "
            f"not fit; set data.max_length={switch} or less"
        )


def _longrope_switches(config: PreTrainedConfig) -> Iterator[int]:
    """Lengths at which rotary factors switch; a model may have one set for each kind of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = [value for value in parameters.values() if isinstance(value, dict)] or [parameters]
    for rope in kinds:
        if rope.get("rope_type") == "longrope":
            yield rope["original_max_position_embeddings"]


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
    layout = min(layouts, key=lambda choice: list(LAYOUTS).index(choice.name))
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
