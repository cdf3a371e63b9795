"""A scoring model without weights: the names and shapes of what a run trains."""

from __future__ import annotations

import torch

from dpo_fast.models.adapters import add_untrained
from dpo_fast.models.adapters_under import put_under
from dpo_fast.models.checkpoint import adapters_under
from dpo_fast.models.config import ModelSection
from dpo_fast.models.load import load_skeleton
from dpo_fast.models.lora import add_lora
from dpo_fast.models.parts import settle_parts
from dpo_fast.models.scoring import ScoringModel


def scoring_skeleton(section: ModelSection, option: str = "model.path") -> ScoringModel:
    """A model on the meta device, with its adapters. option: the configuration key that names it."""
    scoring = ScoringModel(load_skeleton(section, option))
    settle_parts(scoring, section)
    with torch.device("meta"):
        if section.lora is not None:
            add_lora(scoring, section.lora)
        elif section.has_adapters:
            add_untrained(scoring, section.path, option)
        put_under(scoring, adapters_under(section.path), option, weights=False)
    return scoring
