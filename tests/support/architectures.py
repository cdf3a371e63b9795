"""Tiny models of many architectures, with windows, caps, sinks and experts, and a batch to try them on."""

from __future__ import annotations

import torch
import transformers

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"moe_intermediate_size": 24, "num_experts_per_tok": 2}
ARCHITECTURES = {
    "llama": ("LlamaConfig", {}),
    "qwen2, tied": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen2, a window in one layer": (
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3Config", {"head_dim": 8}),
    "mistral, window": ("MistralConfig", {"sliding_window": 4}),
    "gemma2, caps and windows": (
        "Gemma2Config",
        {"head_dim": 8, "final_logit_softcapping": 0.7, "attn_logit_softcapping": 0.5,
         "sliding_window": 4},
    ),
    "gemma3, windows": ("Gemma3TextConfig", {"head_dim": 8, "sliding_window": 4}),
    "phi3, window": ("Phi3Config", {"sliding_window": 5}),
    "phi, bias in the head": ("PhiConfig", {}),
    "mixtral, experts": ("MixtralConfig", {"num_local_experts": 4, "sliding_window": 4}),
    "qwen3-moe, experts": ("Qwen3MoeConfig", EXPERTS | {"num_experts": 4, "head_dim": 8}),
    "gpt-oss, sinks": (
        "GptOssConfig",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 4},
    ),
    "deepseek-v3, unequal head sizes": (
        "DeepseekV3Config",
        EXPERTS | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "q_lora_rank": 16,
                   "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
                   "v_head_dim": 12, "num_key_value_heads": 4, "first_k_dense_replace": 1},
    ),
    "llama4, chunks, temperatures, experts": (
        "Llama4TextConfig",
        {"num_local_experts": 2, "intermediate_size_mlp": 40, "head_dim": 8, "attention_chunk_size": 3,
         "no_rope_layers": [1, 0], "attn_temperature_tuning": True, "floor_scale": 2},
    ),
    "phimoe, experts, a window in its mask alone": (
        "PhimoeConfig", {"num_local_experts": 4, "sliding_window": 4},
    ),
    "qwen2-moe, experts, a window in the mask of one layer": (
        "Qwen2MoeConfig",
        EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 24, "sliding_window": 4,
                   "use_sliding_window": True, "max_window_layers": 1},
    ),
    "cohere, logit scale": ("CohereConfig", {"logit_scale": 0.3}),
    "granite, logits scaling": ("GraniteConfig", {"logits_scaling": 3.0}),
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4}),
}  # fmt: skip
TREES = [
    ([1, 5, 6, 7, 33, 21, 7], [[8, 9, 2], [10, 2], [2]]),
    ([1, 90], [[11, 2], [12, 13, 14, 15, 44, 2]]),
    ([4, 4, 3], [[2], [9, 9, 9, 9, 9, 2], [9, 9, 5], [50, 51, 2]]),
]


def make(name: str, attention: str = "eager", **sizes):
    """A causal LM in fp32 with weights large enough for sharp logits, and no zeros in a bias."""
    config_name, changes = ARCHITECTURES[name]
    config = getattr(transformers, config_name)(**(SIZES | changes | sizes))
    for dropout in ("attn_pdrop", "embd_pdrop", "resid_pdrop"):
        if hasattr(config, dropout):
            setattr(config, dropout, 0.0)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
        parameter.requires_grad_(True)
    return model.eval()


def alone(model, trees=TREES) -> torch.Tensor:
    """Log-probs of every completion token by the model's own logits, one sequence at a time, [T]."""
    scores = []
    for prompt, completions in trees:
        for completion in completions:
            ids = torch.tensor([prompt + completion])
            logp = model(ids, use_cache=False).logits[0].log_softmax(-1)
            rows = logp[len(prompt) - 1 : -1]
            scores.append(rows.gather(1, ids[0, len(prompt) :, None]).squeeze(1))
    return torch.cat(scores)


def slopes(scores: torch.Tensor, parameters) -> list[torch.Tensor | None]:
    """Gradients of a sum in which every token has another weight."""
    return torch.autograd.grad(scores.sin().sum(), list(parameters), allow_unused=True)


def assert_same(scores, gradients, expected, true_gradients, error: float = 1e-5):
    """Scores, and a gradient of every parameter, are equal; a small one to the error of the largest."""
    torch.testing.assert_close(scores, expected, rtol=error, atol=error)
    largest = max(g.abs().max() for g in true_gradients if g is not None)
    for gradient, true in zip(gradients, true_gradients):
        assert (gradient is None) == (true is None)
        if true is not None:
            size = torch.maximum(true.abs().max(), largest * 1e-2)
            assert (gradient - true).abs().max() <= error * size


def errors(scores, gradients, expected, true) -> list[float]:
    """Of the log-probs and of each gradient, as a part of its largest element."""
    found = [(scores - expected).abs().max().item() / expected.abs().max().item()]
    largest = max(each.abs().max() for each in true if each is not None)
    for gradient, right in zip(gradients, true):
        assert (gradient is None) == (right is None)
        if right is not None:
            size = torch.maximum(right.abs().max(), largest * 1e-2)
            found.append(((gradient - right).abs().max() / size).item())
    return found
