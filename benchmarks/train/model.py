"""Models to time: configurations alone, weights drawn at random, written once for every contender."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

QWEN = {
    "model_type": "qwen2",
    "vocab_size": 151936,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}
LLAMA = {"model_type": "llama", "tie_word_embeddings": False, "max_position_embeddings": 4096}
MODELS = {
    "tiny": LLAMA | {  # 8.9 million parameters, 4.2 of them embedding and head
        "vocab_size": 8192, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6,
        "num_attention_heads": 4, "num_key_value_heads": 4,
    },
    "qwen2.5-0.5b": QWEN | {
        "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14,
    },
    "qwen2.5-1.5b": QWEN | {
        "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
        "num_attention_heads": 12,
    },
    "quick": LLAMA | {
        "vocab_size": 1024, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2,
    },
}  # fmt: skip

# Large for DPO, so that the losses of a few steps tell one contender from another.
LEARNING_RATE = dict.fromkeys(MODELS, 1e-4) | {"quick": 1e-2}


@dataclass(frozen=True)
class Sizes:
    """Parameters in all; weights of the layers' products; of the head; and layers x heads x their width."""

    parameters: int
    layers: int
    head: int
    attention: int


def write_model(name: str, tokenizer, folder: Path, device: str, seed: int = 0) -> Sizes:
    """Draw the weights, fp32, and write them with the tokenizer as `save_pretrained` does."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tree = dict(MODELS[name])
    tokens = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = AutoConfig.for_model(tree.pop("model_type"), **tree, bos_token_id=None, **tokens)
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sizes_of(model)


def sizes_of(model) -> Sizes:
    config, head = model.config, model.get_output_embeddings()
    linear = (m for m in model.get_decoder().modules() if isinstance(m, torch.nn.Linear))
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Sizes(
        parameters=sum(p.numel() for p in model.parameters()),
        layers=sum(m.weight.numel() for m in linear),
        head=head.weight.numel(),
        attention=config.num_hidden_layers * config.num_attention_heads * width,
    )
