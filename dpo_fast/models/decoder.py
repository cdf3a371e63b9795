"""The decoder of a model: what gives the states that its head is put on."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel


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
