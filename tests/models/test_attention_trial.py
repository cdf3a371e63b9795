"""The trial of attention: what no configuration tells is found before a weight is read."""

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers")

from transformers.models.phimoe import modeling_phimoe

from dpo_fast.models.attention_trial import try_attention
from dpo_fast.models.decoder import decoder_of
from tests.support.architectures import ARCHITECTURES, SIZES, make


def on_meta(name: str):
    config_name, changes = ARCHITECTURES[name]
    config = getattr(transformers, config_name)(**(SIZES | changes))
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


def tried(model) -> str | None:
    return try_attention(model, decoder_of(model))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_can_share_rows_passes_and_is_left_as_it_was(name):
    for model in (on_meta(name), make(name)):
        before = model.config._attn_implementation
        assert tried(model) is None
        assert model.config._attn_implementation == before


def test_a_window_of_which_nothing_tells(monkeypatch):
    """A model of one's own whose mask has another window than its configuration."""
    model = on_meta("phimoe, experts, a window in its mask alone")
    make_mask = modeling_phimoe.create_sliding_window_causal_mask

    def another(config, **others):
        config = copy.deepcopy(config)
        config.sliding_window = 9
        return make_mask(config=config, **others)

    monkeypatch.setattr(modeling_phimoe, "create_sliding_window_causal_mask", another)
    assert tried(model) == (
        "the mask of PhimoeAttention has a window of 9 tokens, and neither its call nor the "
        "configuration tells of it (a window of 4 tokens)"
    )


def test_a_window_in_the_configuration_that_the_mask_has_not(monkeypatch):
    model = on_meta("phimoe, experts, a window in its mask alone")
    monkeypatch.setattr(
        modeling_phimoe, "create_sliding_window_causal_mask", modeling_phimoe.create_causal_mask
    )
    assert "has no window, and neither" in tried(model)


def test_a_later_layer_is_heard_too():
    """The first layer's attention is plain; the second gets an input that is not known."""
    model = on_meta("llama")
    second = model.model.layers[1].self_attn
    forward = second.forward
    second.forward = lambda *args, **kwargs: forward(*args, **kwargs, bias=torch.ones(1))
    assert tried(model) == "LlamaAttention has an input that is not known here (bias)"


def test_a_model_that_cannot_be_tried_tells_nothing():
    model = on_meta("llama")
    model.model.rotary_emb.forward = None
    assert tried(model) is None
