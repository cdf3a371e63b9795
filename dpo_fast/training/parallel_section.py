"""The section `parallel` of a configuration: how a run is spread over devices."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field, model_validator

from dpo_fast.training.sections import FORBID

# Sections of a DeepSpeed configuration that it would ignore here, or that would change the numbers.
NOT_DEEPSPEEDS = {
    "optimizer": "the optimiser is AdamW with train.learning_rate, weight_decay, adam_beta1, adam_beta2 "
    "and adam_epsilon",
    "scheduler": "train.lr_scheduler_type and train.lr_scheduler_kwargs are the schedule",
    "fp16": "model.dtype is bf16 or fp32",
    "amp": "model.dtype is bf16 or fp32",
    "expert_parallel": "it puts layers of its own in place of the experts, a part on each rank, and "
    "checkpoints, exports and references are by the model's own parameters; parallel.zero_stage=3 spreads "
    "the experts over the ranks",
}


class ParallelSection(BaseModel):
    """How DeepSpeed spreads the run."""

    model_config = FORBID

    zero_stage: Literal["auto", 0, 1, 2, 3] = Field(
        "auto",
        description="what is sharded: 1 optimiser states, 2 also gradients, 3 also parameters; auto: what "
        "the number of ranks needs, 3 on several (2 with torch_compile), on one rank 0, or 1 in bf16, "
        "whose gradients stage 0 would sum in bf16; and as much as an offload needs",
        json_schema_extra={"refused": "3 with model.torch_compile"},
    )
    offload_optimizer: bool = Field(
        False,
        description="optimiser states in CPU memory",
        json_schema_extra={"refused": "below zero_stage=2"},
    )
    offload_parameters: bool = Field(
        False,
        description="parameters in CPU memory",
        json_schema_extra={"refused": "below zero_stage=3"},
    )
    timeout_minutes: float = Field(
        30.0,
        ge=0.05,
        le=60 * 24 * 30,
        description="the other ranks end when one has been silent for so long",
    )
    deepspeed: dict[str, Any] = Field(
        default_factory=dict,
        description="merged into the DeepSpeed configuration",
        json_schema_extra={"refused": "a value that contradicts the other sections"},
    )

    @model_validator(mode="after")
    def _check(self) -> ParallelSection:
        for option, least in (("offload_optimizer", 2), ("offload_parameters", 3)):
            if getattr(self, option) and self.zero_stage != "auto" and self.zero_stage < least:
                raise ValueError(
                    f"parallel.{option}=true needs parallel.zero_stage={least} or more; "
                    f"it is {self.zero_stage}"
                )
        for name, remedy in NOT_DEEPSPEEDS.items():
            if self.deepspeed.get(name, "auto") != "auto":
                raise ValueError(
                    f"parallel.deepspeed.{name} is not DeepSpeed's to decide: {remedy}; remove it"
                )
        return self
