"""The layers of models by kind: which mix tokens beside attention, and how they are named."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

from dpo_fast.models.architecture import architecture_of
from dpo_fast.models.layer_kinds import MixingLayer, carried_state, described, mixing_layers, ranges
from tests.support.architectures import EXPERTS, SIZES

STATE = "layers that carry state along the tokens"
KEYS = "layers that choose their keys out of the whole row"
TYPES = {"layer_types": ["linear_attention", "full_attention"]}
INDEXED = EXPERTS | {
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "index_n_heads": 2,
    "index_head_dim": 8,
    "index_topk": 4,
}
# What is in the way of each: kind, places, the module's name and type, and what it does.
FAMILIES = {
    "MambaConfig": ({}, "linear_attention", [0, 1], "backbone.layers.0.mixer", "MambaMixer", STATE),
    "JambaConfig": (
        {"attn_layer_period": 2, "attn_layer_offset": 1, "num_local_experts": 2},
        *("linear_attention", [0], "model.layers.0.mamba", "JambaMambaMixer", STATE),
    ),
    "Zamba2Config": (
        {"layer_types": ["linear_attention", "hybrid"], "hybrid_layer_ids": [1]},
        *("hybrid", [1], "model.layers.1.mamba_decoder", "Zamba2MambaDecoderLayer", STATE),
    ),
    "RwkvConfig": ({}, "recurrent", [0, 1], "rwkv.blocks.0.attention", "RwkvSelfAttention", STATE),
    "DeepseekV32Config": (
        INDEXED,
        *("indexed_attention", [0, 1], "model.layers.0.self_attn", "DeepseekV32Attention", KEYS),
    ),
    "GlmMoeDsaConfig": (
        INDEXED,
        *("indexed_attention", [0, 1], "model.layers.0.self_attn", "GlmMoeDsaAttention", KEYS),
    ),
}


def on_meta(config_name: str, **changes):
    config = getattr(transformers, config_name)(**(SIZES | changes))
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_in_the_way_is_named(family):
    changes, kind, places, name, type_, does = FAMILIES[family]
    model = on_meta(family, **changes)
    found = [layer for layer in mixing_layers(model) if layer.kind == kind]
    assert [layer.index for layer in found] == places
    assert found[0].name == name and found[0].type == type_
    assert type(model.get_submodule(name)).__name__ == type_
    architecture = architecture_of(model)
    blocking = [layer for layer in architecture.blocking if layer.kind == kind]
    # Who does not stand in the way of sequences that share a row does so where ranks share one.
    told = architecture.obstacle if blocking else architecture.alone
    assert does in told and type_ in told and bool(blocking) == (family == "RwkvConfig")


def test_layers_of_single_tokens_are_in_nobodys_way():
    """Nemotron-H calls its feed-forward layers layers, of the kinds mlp and moe."""
    kinds = ["linear_attention", "full_attention", "mlp", "moe"]
    model = on_meta("NemotronHConfig", layer_types=kinds, num_hidden_layers=4, n_routed_experts=4)
    assert {layer.kind for layer in mixing_layers(model)} == {"linear_attention"}
    assert carried_state(model) == "linear_attention"


def test_chunks_and_windows_carry_no_state():
    model = on_meta("Llama4TextConfig", num_local_experts=2, head_dim=8, intermediate_size_mlp=40)
    assert "chunked_attention" in model.config.layer_types
    assert mixing_layers(model) == [] and carried_state(model) == ""


def test_an_unknown_kind_is_in_the_way():
    model = on_meta("LlamaConfig")
    model.config.layer_types = ["full_attention", "oracle"]
    (layer,) = mixing_layers(model)
    assert layer == MixingLayer(1, "oracle", "model.layers.1.self_attn", "LlamaAttention")
    assert architecture_of(model).obstacle == (
        "it has layers that mix tokens in a way that is not known here (oracle: layer 1, LlamaAttention)"
    )


def test_layers_in_words():
    layers = [MixingLayer(place, "conv", "", "Conv") for place in (0, 1, 2, 5)]
    layers += [MixingLayer(3, "hybrid", "", "")]
    words = f"{STATE} (conv: layers 0-2, 5, Conv; hybrid: layer 3)"
    assert described(layers) == words
    index = MixingLayer(4, "indexed_attention", "", "Index")
    assert described([*layers, index]) == f"{words} and {KEYS} (indexed_attention: layer 4, Index)"
    assert ranges([]) == "" and ranges([7]) == "7"
