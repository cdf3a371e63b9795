"""The section `reference` of the configuration."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class ReferenceSection(BaseModel):
    """Where the reference log-probabilities come from."""

    model_config = ConfigDict(extra="forbid")

    provider: Literal["cached", "frozen", "adapter_off", "none"] = Field(
        "cached",
        description="cached: computed once before training and stored; frozen: a second model beside "
        "the policy; adapter_off: the policy with its LoRA adapters off; none",
    )
    path: str | None = Field(
        None, description="reference model (cached, frozen); default: the policy as it starts"
    )
    cache_dir: str | None = Field(
        None,
        description="folder of a stored reference (cached); a stored one that does not fit this run "
        "is an error; default: output_dir/reference, by content",
    )
