"""The file of `dpo-fast sample`, `judge` and `iterate`: one for all three."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from dpo_fast.generation.config import SampleSection
from dpo_fast.judging.config import JudgeSection, PairsSection
from dpo_fast.models.config import ModelSection
from dpo_fast.rounds.stages import StageSection

# Sections of a run that every stage begins with; a run's own checks read them (`plan.py`).
OF_A_RUN = ("loss", "reference", "train", "parallel", "log", "health", "generate")


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
    stages: list[StageSection] = Field(
        default_factory=list, description="for iterate: what is trained on, one after the other"
    )
    loss: dict[str, Any] = Field(default_factory=dict, description="the section of a run")
    reference: dict[str, Any] = Field(
        default_factory=dict,
        description="the section of a run, without the models: stages name them",
    )
    train: dict[str, Any] = Field(
        default_factory=dict,
        description="the section of a run, without its folder and how it goes on",
    )
    parallel: dict[str, Any] = Field(default_factory=dict, description="the section of a run")
    log: dict[str, Any] = Field(default_factory=dict, description="the section of a run")
    health: dict[str, Any] = Field(default_factory=dict, description="the section of a run")
    generate: dict[str, Any] = Field(
        default_factory=dict,
        description="the section of a run; without a judge of its own that of the section judge",
    )

    @field_validator("output_dir")
    @classmethod
    def _folder(cls, value: str) -> str:
        if not value.strip():
            raise ValueError(f"output_dir={value!r} names no folder; give one")
        return str(Path(os.path.expanduser(value)))
