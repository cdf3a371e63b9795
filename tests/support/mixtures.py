"""Tiny mixtures of experts, one of every family that transformers has in a decoder of its own."""

from __future__ import annotations

import inspect

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from tests.support.architectures import SIZES

# Whichever of these a configuration knows: families call the same thing by different names.
EXPERTS = {
    "num_experts_per_tok": 2, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4,
    "moe_num_experts": 4, "moe_k": 2, "moe_topk": 2, "n_group": 1, "topk_group": 1,
    "moe_intermediate_size": 24, "expert_ffn_hidden_size": 24, "intermediate_size_mlp": 40,
    "shared_expert_intermediate_size": 24, "shared_intermediate_size": 24, "n_shared_experts": 1,
    "num_shared_experts": 1, "moe_num_shared_experts": 1, "first_k_dense_replace": 0,
    "moe_layer_start_index": 0, "num_dense_layers": 0, "decoder_sparse_step": 1, "moe_layers": [0, 1],
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "head_dim": 8, "num_key_value_heads": 4, "zero_expert_num": 2,
}  # fmt: skip
FAMILIES = (
    *("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", "gpt_oss"),
    *("granitemoe", "granitemoeshared", "glm4_moe", "ernie4_5_moe", "llama4_text", "phimoe"),
    *("minimax_m2", "dots1", "hunyuan_v1_moe", "jetmoe", "afmoe", "longcat_flash", "cohere2_moe"),
)


def mixture(family: str, **changes):
    """A causal LM in fp32 with random weights, on eager attention."""
    kind = CONFIG_MAPPING[family]
    known = set(inspect.signature(kind.__init__).parameters).union(
        *(getattr(base, "__annotations__", {}) for base in kind.__mro__)
    )
    options = SIZES | {name: value for name, value in EXPERTS.items() if name in known}
    torch.manual_seed(0)
    config = kind(**(options | changes))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model
