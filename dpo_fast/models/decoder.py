"""The decoder of a model: what gives the states that its head is put on. And its attention."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

IDS = ("input_ids", "input", "inputs")


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """The decoder below every head. Of Llama 4 and others `get_decoder` gives a model with a head.

    Of ModernBERT's decoder it gives the head, which is called `decoder`.
    """
    decoder = model.get_decoder()
    if decoder is model.get_output_embeddings():
        return model.base_model
    while decoder.get_output_embeddings() is not None:
        inner = getattr(decoder, "model", None) or decoder.get_decoder()
        if inner is decoder:
            break
        decoder = inner
    return decoder


def other_senses(decoder: nn.Module) -> list[nn.Module]:
    """Parts of a decoder with a model of images or sounds inside: texts do not come by them (Phi-4)."""
    return [
        part
        for part in decoder.children()
        if any(
            isinstance(inner, PreTrainedModel) and "text" not in _takes(inner)
            for inner in part.modules()
        )
    ]


def _takes(model: PreTrainedModel) -> str | tuple[str, ...]:
    return getattr(model, "input_modalities", None) or "text"


def wants_beside_ids(decoder: nn.Module) -> str | None:
    """What a decoder cannot do without beside token ids, in words; None if they are enough."""
    taken = inspect.signature(decoder.forward).parameters.values()
    needed = [
        each.name
        for each in taken
        if each.default is each.empty
        and each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)
    ]
    others = [name for name in needed if name not in IDS]
    if others:
        return f"its decoder takes {others[0]} beside the tokens before an answer"
    if "perceiver_embeddings" in {each.name for each in taken}:  # Idefics, the first
        return "its layers attend to images, without which it runs on no row"
    return None


def attention_of_parts(config: PretrainedConfig, attention: str) -> str | dict[str, str]:
    """Attention of the text model, as transformers takes it; that of a vision tower stays its own.

    A tower has sequences of its own, which no plan of a row tells of.
    """
    text = config.get_text_config()
    names = [name for name in config.sub_configs if getattr(config, name, None) is text]
    return {"": attention, names[0]: attention} if names else attention


@contextlib.contextmanager
def kept_attention(model: PreTrainedModel) -> Iterator[None]:
    """A context at whose end every part of a model has the attention that it has now."""
    parts = [each.config for each in model.modules() if isinstance(each, PreTrainedModel)]
    before = [(config, config._attn_implementation) for config in parts]
    try:
        yield
    finally:
        for config, attention in before:  # a part comes after what it is a part of
            config._attn_implementation = attention
