"""Backbones from transformers with a scoring head.

Names are imported when they are first used: a configuration is checked without transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dpo_fast.models.architecture import (
        Architecture,
        architecture_of,
        choose_attention,
        choose_layout,
        read_architecture,
    )
    from dpo_fast.models.load import end_of_turn_ids, load_model, load_tokenizer
    from dpo_fast.models.scoring import ScoringModel

_HOMES = {
    "Architecture": "architecture",
    "ScoringModel": "scoring",
    "architecture_of": "architecture",
    "choose_attention": "architecture",
    "choose_layout": "architecture",
    "end_of_turn_ids": "load",
    "load_model": "load",
    "load_tokenizer": "load",
    "read_architecture": "architecture",
}
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


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
