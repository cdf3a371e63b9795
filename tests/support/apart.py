"""A mixture with code of its own and a module for every expert, as before transformers 5."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from tests.support.tokenizers import byte_tokenizer

CODE = '''
import os

import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM


class ApartConfig(MixtralConfig):
    model_type = "apart"


class Block(nn.Module):
    """All tokens of rank r go to expert r: no rank ever calls what another calls."""

    def __init__(self, config):
        super().__init__()
        size = config.hidden_size
        self.experts = nn.ModuleList(nn.Linear(size, size) for _ in range(4))

    def forward(self, hidden_states):
        return torch.tanh(self.experts[int(os.environ["RANK"])](hidden_states))


class ApartForCausalLM(MixtralForCausalLM):
    config_class = ApartConfig

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = Block(config)
        self.post_init()
'''


def write_apart(folder: Path) -> Path:
    """Its folder, with random weights."""
    names: dict = {"os": __import__("os")}
    exec(CODE, names)
    tokenizer = byte_tokenizer(bos=True)
    torch.manual_seed(0)
    config = names["ApartConfig"](
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=2,
        initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    names["ApartForCausalLM"](config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "apart.py").write_text(CODE)
    file = folder / "config.json"
    places = {"AutoConfig": "apart.ApartConfig", "AutoModelForCausalLM": "apart.ApartForCausalLM"}
    told = {"auto_map": places, "architectures": ["ApartForCausalLM"]}
    file.write_text(json.dumps(json.loads(file.read_text()) | told))
    return folder
