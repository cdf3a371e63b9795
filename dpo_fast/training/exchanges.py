"""The bytes that ranks with one row between them exchange in its attention (`models/ulysses.py`)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

from dpo_fast.models import ScoringModel
from dpo_fast.models.layers import decoder_layers
from dpo_fast.training.config import RunConfig
from dpo_fast.training.memory import FP32
from dpo_fast.training.traffic import EXCHANGE, REDUCE, Transfer, passes_of


def exchanges(
    config: RunConfig,
    model: ScoringModel,
    checkpointed: Sequence[int],
    tokens: int,
    predictions: int,
    outputs: int,
    micro_batches: int = 1,
    references: Iterable[ScoringModel] = (),
) -> list[Transfer]:
    """What a rank of a group of `parallel.sequence_parallel` exchanges in a step; [] without groups.

    checkpointed: numbers of the layers that run again in the backward pass.
    tokens: of this rank's slices, over the step.
    predictions: of the whole rows, over the step; each has so many `outputs`, the log-prob and extras.
    micro_batches, references: as in `traffic`.
    """
    ranks = config.parallel.sequence_parallel
    if ranks == 1:
        return []
    own, beside = passes_of(config, micro_batches)
    alone = (
        own.apart + own.before
    ) // micro_batches  # forwards without a backward, over all tokens
    layers = len(decoder_layers(model.causal_lm))
    found = [_heads(config, model, tokens, (2 + alone) * layers + len(checkpointed))]
    for other in references:
        passes = beside.apart // micro_batches * len(decoder_layers(other.causal_lm))
        line = _heads(config, other, tokens, passes)
        found.append(replace(line, what=f"{line.what} of the reference"))
    times = 2 if config.loss.objective.coupled else 1  # others without a backward give one number
    payload = predictions * outputs * times * FP32
    how = f"{predictions:,} predictions x {outputs * times} x {FP32} bytes"
    return [*found, Transfer("log-probs of a row", REDUCE, ranks, payload, how)]


def _heads(config: RunConfig, model: ScoringModel, tokens: int, passes: int) -> Transfer:
    """The exchanges of so many passes of layers, forward or backward."""
    ranks, size = config.parallel.sequence_parallel, config.model.torch_dtype.itemsize
    width = width_of_a_token(model.causal_lm.config.get_text_config(), ranks)
    how = f"{tokens:,} tokens x {width:,} numbers x {size} bytes x {passes} passes of layers"
    return Transfer("heads for tokens", EXCHANGE, ranks, tokens * width * size * passes, how)


def width_of_a_token(config, ranks: int) -> int:
    """Numbers that attention sends of a token: queries, keys and values there, the output back.

    Key heads are repeated until the ranks divide them.
    """
    heads = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    own = getattr(config, "head_dim", None) or config.hidden_size // heads
    nope, rope = (getattr(config, f"qk_{part}_head_dim", None) for part in ("nope", "rope"))
    key = nope + rope if nope and rope else own  # DeepSeek's have another size than values
    value = getattr(config, "v_head_dim", None) or own
    repeated = math.lcm(key_heads, ranks)
    return heads * (key + value) + repeated * (key + value)
