"""Layers of rows of trees that compute every sequence by itself: sparse attention, and n-grams of tokens.

An index that chooses keys, keys that are made of several tokens, biases by distance, and n-grams count
along what they are given. So inside such a layer every sequence gets a row of its own, as in a padded
batch; attention has a causal mask there, and is transformers' own. All round it tokens stay in the one
row. What a trunk is to several branches the layer computes for each of them.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dpo_fast.models.attention_plan import AttentionPlan
from dpo_fast.models.layer_kinds import mixing_layers
from dpo_fast.models.recurrent.told import check_whole_row, replace_forward
from dpo_fast.models.recurrent.unfolded import over_sequences, sequences_of

# Classes of attention by name. Some serve plain layers of their models, too, which stay as they are.
ATTENTION = frozenset(
    (
        *("DeepseekV32Attention", "GlmMoeDsaAttention", "AXK2Attention", "HYV4Attention"),
        *("MistralLarge4TextAttention", "Dots3NoteTextAttention", "Qwen4ExpTextAttention"),
        *("MiniMaxM3VLAttention", "DeepseekV4Attention"),
        # Biases by the distance of keys, and convolutions of keys and values.
        *("InklingAttention", "Inkling2SlidingAttention", "Inkling2FullAttention"),
    )
)
# Layers that add features of n-grams in a part `ple`, which gets no keywords.
NGRAMS = frozenset(("Qwen4ExpTextDecoderLayer",))
# Beside compressed keys these see a window of single ones, by the mask that they are given.
WINDOWED = frozenset(("DeepseekV4Attention",))


def serves(module: nn.Module) -> bool:
    """Whether this is attention of such a class. FSDP gives modules a class below their own."""
    return _is_one_of(module, ATTENTION)


def _is_one_of(module: nn.Module, names: frozenset[str]) -> bool:
    return any(kind.__name__ in names for kind in type(module).__mro__)


def serve_by_sequence(model: PreTrainedModel) -> None:
    """Have such layers of a model compute rows of trees, in place."""
    for layer in mixing_layers(model):
        module = model.get_submodule(layer.name) if layer.name else None
        if module is not None and serves(module) and not hasattr(module, "forward_of_batches"):
            module.config_of_batches = copy.copy(module.config)
            plain = model._supports_sdpa and not hasattr(module, "sinks")
            module.config_of_batches._attn_implementation = "sdpa" if plain else "eager"
            replace_forward(module, _attend)
    for module in model.modules():
        if _is_one_of(module, NGRAMS) and getattr(module, "ple", None) is not None:
            replace_forward(module, _tell_ngrams)
            replace_forward(module.ple, _ngrams)


def _tell_ngrams(module: nn.Module, *arguments, ple_input_ids=None, **options):
    """A layer's forward. Its part gets the plan with its ids: as an argument it is recomputed, too."""
    if isinstance(plan := options.get("plan"), AttentionPlan):
        ple_input_ids = plan, ple_input_ids
    return module.forward_of_batches(*arguments, ple_input_ids=ple_input_ids, **options)


def _ngrams(module: nn.Module, hidden_states: Tensor, input_ids, *arguments, **options):
    if isinstance(input_ids, Tensor):
        return module.forward_of_batches(hidden_states, input_ids, *arguments, **options)
    plan, ids = input_ids
    check_whole_row(plan)
    return _over(module, plan, hidden_states, ids, *arguments, **options)


@torch.compiler.disable  # it computes with indices of the row
def _over(module: nn.Module, plan: AttentionPlan, *arguments, **options):
    return over_sequences(module.forward_of_batches, plan, *arguments, **options)


def _attend(module: nn.Module, *arguments, plan: AttentionPlan | None = None, **options):
    if not isinstance(plan, AttentionPlan):  # none, or the mark of a trial
        told = {} if plan is None else {"plan": plan}
        return module.forward_of_batches(*arguments, **told, **options)
    check_whole_row(plan)
    return _by_plan(module, plan, *arguments, **options)


def _by_plan(module: nn.Module, plan: AttentionPlan, *arguments, attention_mask=None, **options):
    """The layer over sequences. In a row of trees there is no mask to be given."""
    hidden = options.get("hidden_states", arguments[0] if arguments else None)
    config, module.config = module.config, module.config_of_batches
    if "conv_mask" in options:
        options["conv_mask"] = None
    try:
        options["attention_mask"] = _mask(module, plan, hidden)
        return _over(module, plan, *arguments, **options)
    finally:
        module.config = config


def _mask(module: nn.Module, plan: AttentionPlan, like: Tensor) -> Tensor:
    """[S, 1, L, L], as the layer's attention takes it: bool, or 0 and the least number of the dtype."""
    count, length = plan.once(sequences_of).tokens.shape
    windowed = module.config if _is_one_of(module, WINDOWED) else module
    window = getattr(windowed, "sliding_window", None)
    place = torch.arange(length, device=like.device)
    behind = place[:, None] - place
    sees = (behind >= 0) if window is None else (behind >= 0) & (behind < window)
    if module.config._attn_implementation == "eager":
        least = torch.finfo(like.dtype).min
        sees = torch.zeros_like(sees, dtype=like.dtype).masked_fill_(~sees, least)
    return sees.expand(count, 1, length, length)
