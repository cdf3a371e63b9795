"""The file of `dpo-fast sample`, `judge` and `iterate`: one for all three."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from dpo_fast.generation.config import SampleSection
from dpo_fast.judging.config import JudgeSection, PairsSection
from dpo_fast.models.config import ModelSection


class RoundsConfig(BaseModel):
    """Training in rounds. A command reads the sections that it needs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    output_dir: str = Field(description="the folder of everything that is made")
    model: ModelSection
    data: dict[str, Any] = Field(
        default_factory=dict, description="options of the section data of a run, without train"
    )
    sample: SampleSection | None = None
    judge: JudgeSection | None = None
    pairs: PairsSection = PairsSection()
