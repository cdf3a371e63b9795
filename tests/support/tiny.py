"""Any architecture of transformers, made tiny: its default configuration with small numbers."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

CAUSAL = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
IMAGES = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
ARCHITECTURES = sorted({*CAUSAL, *IMAGES})
LARGEST = 30_000_000  # parameters
# A number of a configuration is made this small, if it is larger; 0 and None stay.
SIZES = {
    32: "hidden_size d_model n_embd dim embed_dim embedding_size word_embed_proj_dim hidden_dim "
        "out_hidden_size projection_dim vision_output_dim output_dim mm_hidden_size embed_proj_dim "
        "attention_hidden_size",
    48: "intermediate_size ffn_dim d_ff n_inner encoder_ffn_dim decoder_ffn_dim ffn_hidden_size "
        "intermediate_size_mlp mlp_hidden_size",
    16: "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size "
        "expert_ffn_hidden_size expert_intermediate_size moe_shared_expert_intermediate_size "
        "image_size q_lora_rank kv_lora_rank num_position_embeddings position_embedding_size",
    2: "num_hidden_layers n_layer num_layers n_layers encoder_layers decoder_layers depth num_blocks "
       "num_key_value_heads num_kv_heads n_head_kv num_experts_per_tok moe_topk top_k_experts",
    4: "num_attention_heads n_head num_heads n_heads encoder_attention_heads decoder_attention_heads "
       "num_experts num_local_experts n_routed_experts moe_num_experts patch_size",
    8: "head_dim kv_channels qk_rope_head_dim qk_nope_head_dim v_head_dim global_head_dim "
       "qk_head_dim attention_head_dim mamba_d_state",
    1: "n_group topk_group n_shared_experts first_k_dense_replace pad_token_id bos_token_id eos_token_id",
    97: "vocab_size",
    64: "max_position_embeddings n_positions n_ctx max_sequence_length",
}  # fmt: skip
SMALL = {name: size for size, names in SIZES.items() for name in names.split()}


# What the small numbers alone do not make whole.
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
CHANGES = {
    "bamba": MAMBA,
    "granitemoehybrid": MAMBA | {"layer_types": ["mamba", "attention"]},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 1, "ssm_state_size": 8},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1},
    "olmo_hybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "gemma4_text": {"vocab_size_per_layer_input": 97, "hidden_size_per_layer_input": 8},
    "gemma4": {"text_config": {"vocab_size_per_layer_input": 97, "hidden_size_per_layer_input": 8}},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "xlnet": {"d_head": 8},
    "xlm": {"emb_dim": 32},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "llama4": {
        "vision_config": {
            "vision_output_dim": 32,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
        }
    },
    "blt": {"encoder_hash_byte_group_vocab": 50},
    "recurrent_gemma": {"lru_width": 32},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 8},
    "inkling2": {"vision_config": {"text_hidden_size": 32}},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    **dict.fromkeys(
        (
            "qwen2_vl",
            "qwen2_5_vl",
            "qwen2_5_omni_thinker",
            "paddleocr_vl",
            "glm4v",
            "glm46v",
            "glmga",
            "glm_ocr",
            "cosmos3_edge",
        ),
        {"text_config": MROPE},
    ),
    "glm4v_moe": {
        "text_config": {
            "rope_parameters": MROPE["rope_parameters"] | {"partial_rotary_factor": 1.0}
        }
    },
    "codegen": {"rotary_dim": 8},
    "gptj": {"rotary_dim": 8},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "ernie4_5_moe": {"moe_k": 2},
    "kimi_linear": {"num_experts_per_token": 2, "linear_num_heads": 2, "linear_head_dim": 8},
    "longcat_flash": {"qk_head_dim": 16, "moe_topk": 2, "zero_expert_num": 2},
    "granite4_vision": {"deepstack_layer_map": [[0, 0]]},
    "dbrx": {"attn_config": {"rope_theta": 1e4}},
}


def tiny_config(name: str, **changes) -> PretrainedConfig:
    """The configuration of an architecture, by its model_type. changes: other values."""
    return _shrunk(CONFIG_MAPPING[name](), CHANGES.get(name, {}) | changes)


def _shrunk(config: PretrainedConfig, changes: dict) -> PretrainedConfig:
    layers, given = getattr(config, "num_hidden_layers", None), {}
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            given[name] = _shrunk(value, changes.get(name, {}))
        elif name in SMALL and isinstance(value, int) and value > 0 and not isinstance(value, bool):
            given[name] = min(value, SMALL[name])
        elif isinstance(value, (list, tuple)) and layers and len(value) == layers > 2:
            given[name] = list(value)[:2]
    heads = vars(config).get("num_key_value_heads")
    latent = vars(config).get("kv_lora_rank")  # of every head its own keys, and rotary parts of 8
    if (
        heads
        and "num_attention_heads" in given
        and (latent or heads == vars(config).get("num_attention_heads"))
    ):
        given["num_key_value_heads"] = given["num_attention_heads"]
    flat = {
        name: value
        for name, value in changes.items()
        if name not in given or not isinstance(given[name], PretrainedConfig)
    }
    return type(config)(**(given | flat))


def whole_class(config: PretrainedConfig) -> type:
    """The class of transformers that has all of an architecture, its towers too."""
    images = type(config) in AutoModelForImageTextToText._model_mapping
    return AutoModelForImageTextToText if images else AutoModelForCausalLM


class NotTiny(Exception):
    """An architecture that the small numbers do not make."""


def write_tiny(folder: Path, name: str, more: dict[str, torch.Tensor]) -> torch.nn.Module:
    """A checkpoint of an architecture, with more tensors in its file. Returns the model.

    Raises:
        NotTiny: it cannot be built.
    """
    try:
        config = tiny_config(name)
        with torch.device("meta"):
            model = whole_class(config).from_config(config)
        if sum(parameter.numel() for parameter in model.parameters()) > LARGEST:
            raise NotTiny(f"{name}: the small numbers do not make it small")
        torch.manual_seed(0)
        model = whole_class(config).from_config(config, attn_implementation="eager").eval()
    except Exception as error:  # whatever a configuration does not like
        raise NotTiny(f"{name}: {error}") from error
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    save_file(load_file(file) | more, file, {"format": "pt"})
    return model
