"""The sections `judge` and `pairs`: what scores completions, and which pairs are made of them."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class JudgeSection(BaseModel):
    """What scores completions."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class PairsSection(BaseModel):
    """Which pairs are made of scored completions."""

    model_config = ConfigDict(extra="forbid", frozen=True)
