"""Backbones from transformers with a scoring head."""

from dpo_fast.models.attention import check_packing, choose_attention
from dpo_fast.models.load import load_model, load_tokenizer
from dpo_fast.models.scoring import ScoringModel

__all__ = ["ScoringModel", "check_packing", "choose_attention", "load_model", "load_tokenizer"]
