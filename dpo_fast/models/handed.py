"""Families whose decoders hand no keywords to their attention, and how it gets the plan of a row.

Some layers leave keywords out that their attention would take (`LAYERS`). Older decoders hand none on, and
compute attention by code of their own (`DECODERS`). In both, the plan comes in the place of the mask, which
a row of trees has not got: as an argument it is there again when a layer is recomputed.

Attention of their own runs over sequences in rows of their own inside the layer, with a causal mask, as in
a padded batch. All round it tokens stay in the one row.
"""

from __future__ import annotations

import inspect
from types import FunctionType

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dpo_fast.models.attention_plan import AttentionPlan
from dpo_fast.models.decoder import decoder_of
from dpo_fast.models.recurrent.told import check_whole_row, replace_forward
from dpo_fast.models.recurrent.unfolded import over_sequences, sequences_of

# Decoder layers, and their attention, which takes keywords.
LAYERS = {"StableLmDecoderLayer": "StableLmAttention", "NemotronDecoderLayer": "NemotronAttention"}
# Decoders, and their attention. Its places are those of position_ids, or of ALiBi (arXiv 2108.12409).
DECODERS = {
    "FalconModel": "FalconAttention",
    "GPTJModel": "GPTJAttention",
    "CodeGenModel": "CodeGenAttention",
    "GPTNeoModel": "GPTNeoSelfAttention",
    "GPTNeoXJapaneseModel": "GPTNeoXJapaneseAttention",
    "BloomModel": "BloomAttention",
    "MptModel": "MptAttention",
}
MASKS = "create_causal_mask"  # of transformers, which a decoder's forward calls


class Carried:
    """A plan in the place of a mask. Decoders may ask a mask for its dimensions, and change its dtype."""

    ndim = 0

    def __init__(self, plan, mask: Tensor | None = None) -> None:
        self.plan, self.mask = plan, mask

    def to(self, *arguments, **options) -> Carried:
        return self


def own_attention(model: PreTrainedModel) -> bool:
    """Whether a model's attention is code of its own that serves rows of trees.

    Falcon's with ALiBi is not: transformers adds the bias to the mask, and to the scores where these are
    computed by eager attention.
    """
    decoder = decoder_of(model)
    name = _name_in(decoder, DECODERS)
    masked = MASKS in inspect.unwrap(type(decoder).forward).__code__.co_names
    return name is not None and masked and not getattr(decoder, "use_alibi", False)


def counts_places(model: PreTrainedModel) -> bool:
    """Whether such attention has places of its own in every sequence, whatever position_ids are."""
    return own_attention(model) and _name_in(decoder_of(model), DECODERS) in (
        "BloomModel",
        "MptModel",
    )


def served(module: nn.Module) -> bool:
    """Whether this is attention that gets the plan here."""
    return _name_in(module, {*LAYERS.values(), *DECODERS.values()}) is not None


def serve_handed(model: PreTrainedModel) -> None:
    """Have a model's attention get the plan of a row, in place. Without a plan it computes what it did."""
    for module in model.modules():
        if name := _name_in(module, LAYERS):
            replace_forward(module, _layer)
            for each in module.modules():
                if _name_in(each, {LAYERS[name]}):
                    replace_forward(each, _with_keyword)
    if own_attention(model):
        decoder = decoder_of(model)
        replace_forward(decoder, _decoder)
        for module in decoder.modules():
            if _name_in(module, {DECODERS[_name_in(decoder, DECODERS)]}):
                replace_forward(module, _attention)


def _name_in(module: nn.Module, names) -> str | None:
    """The one of these names that a module's class has. FSDP gives modules a class below their own."""
    return next((kind.__name__ for kind in type(module).__mro__ if kind.__name__ in names), None)


def _layer(module: nn.Module, *arguments, plan=None, attention_mask=None, **options):
    if plan is not None:  # or what a trial has in its place
        attention_mask = Carried(plan, attention_mask)
    return module.forward_of_batches(*arguments, attention_mask=attention_mask, **options)


def _with_keyword(module: nn.Module, *arguments, attention_mask=None, **options):
    if isinstance(attention_mask, Carried):
        options["plan"], attention_mask = attention_mask.plan, attention_mask.mask
    return module.forward_of_batches(*arguments, attention_mask=attention_mask, **options)


def _decoder(module: nn.Module, *arguments, plan: AttentionPlan | None = None, **options):
    """A decoder's forward: the same code, with the plan for what it calls to make a mask."""
    if not isinstance(plan, AttentionPlan):  # none, or the mark of a trial
        return module.forward_of_batches(*arguments, **options)
    check_whole_row(plan)
    forward = inspect.unwrap(type(module).forward)
    names = forward.__globals__ | {MASKS: lambda *_, **__: Carried(plan)}
    parts = (forward.__defaults__, forward.__closure__)
    changed = FunctionType(forward.__code__, names, None, *parts)
    changed.__kwdefaults__ = forward.__kwdefaults__
    return changed(module, *arguments, **options)


def _attention(module: nn.Module, *arguments, attention_mask=None, **options):
    if isinstance(attention_mask, Carried):
        return _by_plan(module, attention_mask.plan, *arguments, **options)
    return module.forward_of_batches(*arguments, attention_mask=attention_mask, **options)


def _behind(spans, device: torch.device, length: int, dtype: torch.dtype) -> Tensor:
    """What is added to the scores of `length` tokens: the least number for those that come later."""
    least = torch.finfo(dtype).min
    return torch.full((length, length), least, dtype=dtype, device=device).triu(1)


@torch.compiler.disable  # it computes with indices of the row
def _by_plan(module: nn.Module, plan: AttentionPlan, hidden_states: Tensor, *arguments, **options):
    count, length = plan.once(sequences_of).tokens.shape
    mask = plan.once(_behind, length, hidden_states.dtype)
    mask = mask.expand(count, 1, length, length)
    if _name_in(module, {"MptAttention"}):
        mask = mask.to(torch.bool)  # what is not seen
    if (
        alibi := options.get("alibi")
    ) is not None:  # [heads, 1, tokens of the row] of the first place on
        options["alibi"] = alibi[..., :length].repeat(count, 1, 1)
    options["attention_mask"] = mask
    return over_sequences(module.forward_of_batches, plan, hidden_states, *arguments, **options)
