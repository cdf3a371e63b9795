"""Model folders as people bring them: image-text models, experts, tied heads, shards, files beside."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file

from tests.support.tokenizers import byte_tokenizer

TEXT = {
    "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2, "attention_dropout": 0.1,
}  # fmt: skip
VISION = {
    "depth": 1, "hidden_size": 32, "intermediate_size": 40, "num_heads": 2, "out_hidden_size": 32,
    "num_position_embeddings": 16, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 1,
}  # fmt: skip
LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
GEMMA_VISION = {
    "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 16, "patch_size": 4,
}  # fmt: skip
EXPERTS = {"moe_intermediate_size": 24, "num_experts_per_tok": 2, "num_experts": 4}
# Configuration, its text part, its vision part, more of it; the class that writes it.
MODELS = {
    "llama": ("LlamaConfig", {}, None, "LlamaForCausalLM"),
    "llama, tied": ("LlamaConfig", {"tie_word_embeddings": True}, None, "LlamaForCausalLM"),
    "mixtral, fused experts": (
        "MixtralConfig", {"num_local_experts": 4}, None, "MixtralForCausalLM",
    ),
    "qwen3-moe, tied": (
        "Qwen3MoeConfig", EXPERTS | {"tie_word_embeddings": True}, None, "Qwen3MoeForCausalLM",
    ),
    "qwen3.5, image and text": (
        "Qwen3_5Config", LINEAR, VISION, "Qwen3_5ForConditionalGeneration",
    ),
    "gemma3, image and text": (
        "Gemma3Config", {"sliding_window": 16}, GEMMA_VISION, "Gemma3ForConditionalGeneration",
    ),
    "qwen3-vl, image and text": (
        "Qwen3VLConfig",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}},
        VISION | {"deepstack_visual_indexes": [0]},
        "Qwen3VLForConditionalGeneration",
    ),
}  # fmt: skip
# Files of a folder, beside those of the model and the tokenizer.
BESIDE = {
    "preprocessor_config.json": '{"image_mean": [0.5, 0.5, 0.5]}',
    "processor_config.json": '{"processor_class": "Own", "image_seq_length": 4}',
    "video_preprocessor_config.json": "{}",
    "chat_template.jinja": "{{ messages }}",
    "additional_chat_templates/tools.jinja": "{{ tools }}",
    "modeling_own.py": "x = 1\n",
    "LICENSE": "yours",
    "README.md": "# A model",
}


def write_checkpoint(folder: Path, name: str, dtype: torch.dtype = torch.float32) -> Path:
    """A model of the table with a tokenizer and the files of `BESIDE`."""
    config, text, vision, model = MODELS[name]
    tokenizer = byte_tokenizer(bos=True)
    sizes = (
        TEXT | text | {"vocab_size": len(tokenizer) + 11}
    )  # some classes of tokenizers add tokens
    if vision is not None:
        sizes = {"text_config": sizes, "vision_config": vision}
        sizes |= {"mm_tokens_per_image": 4} if "Gemma" in config else {}
    torch.manual_seed(0)
    config = getattr(transformers, config)(**sizes)
    getattr(transformers, model)(config).to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for file, content in BESIDE.items():
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text(content)
    generation = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(generation | {"top_k": 7}))
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint's files, by name."""
    found = {}
    for file in sorted(folder.glob("model*.safetensors")):
        with safe_open(file, "pt") as tensors:
            found |= {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    return found


def shard(folder: Path, parts: int, rename=lambda name: name) -> None:
    """Write the weights anew, as so many files, under other names."""
    tensors = {rename(name): tensor for name, tensor in tensors_of(folder).items()}
    for file in folder.glob("model*.safetensors*"):
        file.unlink()
    places = {}
    for part in range(parts):
        own = dict(list(tensors.items())[part::parts])
        file = f"model-{part + 1:05d}-of-{parts:05d}.safetensors"
        save_file(own, folder / file, {"format": "pt"})
        places |= dict.fromkeys(own, file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
