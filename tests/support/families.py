"""Every family of causal language models that transformers has, tiny, with windows, chunks and experts."""

from __future__ import annotations

import inspect

import torch
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from dpo_fast.models.load import auto_class

TEXT = tuple(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
IMAGES = tuple(
    name for name in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES if name not in TEXT
)
# Whichever of these a configuration knows: families call the same thing by different names.
NAMES = {
    32: "hidden_size d_model n_embd n_embed embedding_size word_embed_proj_dim lru_width out_hidden_size",
    40: "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim n_inner d_ff d_inner ffn_hidden_size "
        "intermediate_size_mlp",
    24: "moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size "
        "shared_intermediate_size moe_shared_expert_intermediate_size",
    4: "num_hidden_layers num_layers n_layer n_layers decoder_layers num_attention_heads n_head n_heads "
       "num_heads decoder_attention_heads encoder_attention_heads num_experts num_local_experts "
       "n_routed_experts moe_num_experts rotary_dim sliding_window attention_chunk_size window_size "
       "local_window attention_window_size index_topk mamba_n_heads mamba_num_heads mamba_dt_rank "
       "linear_num_value_heads linear_conv_kernel_dim laurel_rank",
    2: "encoder_layers num_key_value_heads num_kv_heads num_experts_per_tok moe_k moe_topk top_k_experts "
       "zero_expert_num mamba_n_groups n_groups mamba_ngroups mamba_expand n_mamba_heads "
       "linear_num_key_heads eos_token_id",
    8: "head_dim global_head_dim kv_channels qk_rope_head_dim qk_nope_head_dim v_head_dim index_head_dim "
       "mamba_d_state ssm_state_size state_size linear_key_head_dim linear_value_head_dim "
       "hidden_size_per_layer_input chunk_size mamba_chunk_size index_n_heads",
    16: "q_lora_rank kv_lora_rank mamba_d_head mamba_head_dim",
    64: "mamba_d_ssm",
    1: "n_group topk_group n_shared_experts num_shared_experts moe_num_shared_experts decoder_sparse_step "
       "router_num_group bos_token_id depth",
    0: "pad_token_id num_dense_layers",
    97: "vocab_size vocab_size_per_layer_input",
    128: "max_position_embeddings n_positions n_ctx max_seq_len",
}  # fmt: skip
SIZES = {name: size for size, names in NAMES.items() for name in names.split()}
WINDOWS = {"layer_types": ["sliding_attention", "full_attention"] * 2}
LINEAR = {"layer_types": ["linear_attention", "full_attention"] * 2}
CONVOLUTIONS = {"layer_types": ["conv", "full_attention"] * 2}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
HALF = {"partial_rotary_factor": 0.5}
# Places in time, height and width: so many pairs of a head of 8 go by each.
THREE = dict.fromkeys(
    (
        "qwen2_vl_text",
        "qwen2_5_vl_text",
        "qwen2_5_omni_text",
        "glm4v_text",
        "glm_ocr_text",
        "hunyuan_vl_text",
    )
    + ("paddleocr_vl_text",),
    {"rope_parameters": ROPE | {"mrope_section": [1, 1, 2]}},
)
IN_SOME = {"use_sliding_window": True, "max_window_layers": 2}
INKLING = {
    "layer_types": ["hybrid_sliding", "hybrid"] * 2, "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2, "swa_head_dim": 8, "sliding_window_size": 4, "d_rel": 4,
    "rel_extent": 6,
}  # fmt: skip
# By the type of a configuration, what sizes alone do not make whole, or what its defaults leave out.
CHANGES = THREE | {
    "bailing_hybrid": LINEAR,
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere_compass_text": WINDOWS
    | {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "dots1": WINDOWS,
    "dots3_note_text": {
        "layer_types": ["indexed_attention", "sliding_attention"] * 2,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
        "shared_experts_intermediate_size": 24,
    },
    "gemma3_text": WINDOWS,
    "gemma3n_text": WINDOWS
    | {"num_kv_shared_layers": 2, "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0]},
    "gemma4_text": WINDOWS | {"num_kv_shared_layers": 2},
    "gemma4_unified_text": WINDOWS,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": LINEAR,
    "inkling_text": INKLING | {"log_scaling_n_floor": 3},
    "inkling2_text": INKLING,
    "jamba": {"num_hidden_layers": 8},
    "kimi_linear": LINEAR | {"linear_head_dim": 8, "linear_num_heads": 4, "num_key_value_heads": 4},
    "laguna": WINDOWS,
    "lfm2": CONVOLUTIONS,
    "lfm2_moe": CONVOLUTIONS,
    "llama4_text": {"attn_temperature_tuning": True, "floor_scale": 3, "attn_scale": 0.7},
    "mamba2": {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 2},
    "mellum": WINDOWS,
    "minimax_m3_vl_text": {
        "layer_types": ["minimax_m3_sparse", "full_attention"] * 2,
        "index_block_size": 4,
        "index_topk_blocks": 2,
        "index_n_heads": 2,
        "index_head_dim": 8,
    },
    "ministral": WINDOWS,
    "nemotron_h": {"layer_types": ["linear_attention", "full_attention", "mlp", "moe"]},
    "qwen2": IN_SOME,
    "qwen2_moe": IN_SOME,
    "qwen3": IN_SOME,
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
        "hc_lowrank": 8,
        "ple_layer_ids": [1, 3],
        "ngram_vocab_size_base": 20,
        "make_ngram_vocab_size_divisible_by": 8,
        "split_ngram_parts": 1,
        "layer_types": ["linear_attention", "indexed_attention"] * 2,
    },
    "recurrent_gemma": {"num_hidden_layers": 6},
    "glm4v_moe_text": {"rope_parameters": ROPE | HALF | {"mrope_section": [0, 1, 1]}},
    "zamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_hidden_layers": 6},
    "zamba2": {"layer_types": ["linear_attention", "hybrid"] * 2, "hybrid_layer_ids": [1, 3]}
    | {"num_mem_blocks": 1},
    "zaya": {"num_experts_per_tok": 1, "layer_types": ["hybrid", "hybrid_sliding"] * 2},
}
# These are encoders, unless their configuration says otherwise.
DECODERS = (
    *(
        "bart",
        "bert",
        "bert-generation",
        "big_bird",
        "bigbird_pegasus",
        "blenderbot",
        "blenderbot-small",
    ),
    *("camembert", "data2vec-text", "electra", "ernie", "marian", "mbart", "megatron-bert", "mvp"),
    *("pegasus", "plbart", "prophetnet", "rembert", "roberta", "roberta-prelayernorm", "roc_bert"),
    *("roformer", "trocr", "whisper", "xlm-roberta", "xlm-roberta-xl"),
)
LARGEST = 60_000_000  # parameters: a larger one has something that is not tiny


def config_of(family: str, **changes) -> PretrainedConfig:
    """A tiny configuration, changed. Raises what the family's own checks raise."""
    kind = CONFIG_MAPPING[family]
    parts = getattr(kind, "sub_configs", {}) or {}
    options = {} if "text_config" in parts else _options(kind)
    for name, part in parts.items():
        given = part if inspect.isclass(part) and part.__name__ != "AutoConfig" else None
        default = given or type(getattr(kind(), name, None))
        options[name] = {"model_type": default.model_type, **_options(default)}
    return kind(**(options | changes))


def _options(kind: type) -> dict:
    known = set(inspect.signature(kind.__init__).parameters).union(
        *(getattr(base, "__annotations__", {}) for base in kind.__mro__)
    )
    aliases = getattr(kind, "attribute_map", None) or {}
    options = {name: size for name, size in SIZES.items() if name in known | aliases.keys()}
    for alias, name in aliases.items():
        if alias != name and name in options:
            options.pop(alias, None)
    if "kv_lora_rank" in known:  # every head has keys of its own
        options["num_key_value_heads"] = 4
    if kind.model_type in DECODERS:
        options["is_decoder"] = True
    return options | CHANGES.get(kind.model_type, {})


def family_on_meta(family: str) -> PreTrainedModel:
    config = config_of(family)
    with torch.device("meta"):
        return auto_class(config).from_config(config)


def tiny(family: str, **changes) -> PreTrainedModel | None:
    """A model in fp32 with random weights, on eager attention; None where it would not be small."""
    if sum(p.numel() for p in family_on_meta(family).parameters()) > LARGEST:
        return None
    config = config_of(family, **changes)
    torch.manual_seed(0)
    model = auto_class(config).from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            # Decays, biases and norms stay near where they begin.
            parameter.copy_(0.3 * drawn if parameter.dim() > 1 else parameter + 0.2 * drawn)
    return model
