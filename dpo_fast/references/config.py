"""The section `reference` of the configuration."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dpo_fast.models.config import Place


class ReferenceSection(BaseModel):
    """Where the reference log-probabilities come from."""

    model_config = ConfigDict(extra="forbid")

    provider: Literal["cached", "frozen", "ema", "adapter_off", "columns", "none"] = Field(
        "cached",
        description="cached: computed once before training and stored; frozen: a second model beside "
        "the policy; ema: one that follows it (TR-DPO); adapter_off: the policy with its adapters off; "
        "columns: reference_chosen_logps and reference_rejected_logps, or reference_completion_logps, of "
        "the data; none. With a loss that estimates kl the default is frozen, with LoRA adapter_off",
    )
    path: Place | None = Field(
        None, description="reference model (cached, frozen, ema); default: the policy as it starts"
    )
    cache_dir: str | None = Field(
        None,
        description="stored references (cached): one folder, or several below this one; one of "
        "another model, or without this run's pairs, is an error; default: output_dir/reference, by "
        "content",
    )
    per_token: bool = Field(
        False, description="store the log-prob of every token beside the sums (cached)"
    )
    offload: bool | None = Field(
        None,
        description="parameters of a second model (frozen, or cached with a path) in CPU memory "
        "between uses, at ZeRO stage 3; default: as parallel.offload_parameters",
    )

    old_path: Place | None = Field(
        None,
        description="model that wrote the completions of groups (grpo, dapo); default: the policy as it "
        "starts. Its log-probs are stored once, in output_dir/reference",
    )
    mixup_alpha: float = Field(
        0.6, gt=0, le=1, description="share of the policy in the new reference (ema); 1 copies it"
    )
    sync_steps: int = Field(512, ge=1, description="optimiser steps between updates (ema)")

    @model_validator(mode="after")
    def _check(self) -> ReferenceSection:
        if self.per_token and self.provider != "cached":
            raise ValueError(
                f"reference.per_token=true is not used by provider={self.provider}; remove it, or "
                "choose cached"
            )
        return self
