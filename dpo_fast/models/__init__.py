"""Backbones from transformers with a scoring head."""

from dpo_fast.models.architecture import (
    Architecture,
    architecture_of,
    choose_attention,
    choose_layout,
    read_architecture,
)
from dpo_fast.models.load import end_of_turn_ids, load_model, load_tokenizer
from dpo_fast.models.scoring import ScoringModel

__all__ = [
    "Architecture",
    "ScoringModel",
    "architecture_of",
    "choose_attention",
    "choose_layout",
    "end_of_turn_ids",
    "load_model",
    "load_tokenizer",
    "read_architecture",
]
