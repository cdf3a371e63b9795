"""The section `parallel` of a configuration: how a run is spread over devices."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import BaseModel, Field, model_validator

from dpo_fast.training.sections import FORBID

# Sections of a DeepSpeed configuration that it would ignore here, or that would change the numbers.
NOT_DEEPSPEEDS = {
    "optimizer": "train.optim is the optimiser, with train.learning_rate, weight_decay, adam_beta1, "
    "adam_beta2 and adam_epsilon",
    "scheduler": "train.lr_scheduler_type and train.lr_scheduler_kwargs are the schedule",
    "fp16": "model.dtype is bf16 or fp32",
    "amp": "model.dtype is bf16 or fp32",
    "expert_parallel": "it puts layers of its own in place of the experts, a part on each rank, and "
    "checkpoints, exports and references are by the model's own parameters; parallel.zero_stage=3 spreads "
    "the experts over the ranks",
    "sequence_parallel_size": "parallel.sequence_parallel is",
}

ZERO_PLUS_PLUS = ("zero_hpz_partition_size", "zero_quantized_weights", "zero_quantized_gradients")


class ParallelSection(BaseModel):
    """How DeepSpeed spreads the run."""

    model_config = FORBID

    zero_stage: Literal["auto", 0, 1, 2, 3] = Field(
        default="auto",
        description="what is sharded: 1 optimiser states, 2 also gradients, 3 also parameters; auto: what "
        "the number of ranks needs, 3 on several (2 with torch_compile), on one rank 0, or 1 in bf16, "
        "whose gradients stage 0 would sum in bf16; and as much as an offload needs",
        json_schema_extra={"refused": "3 with model.torch_compile"},
    )
    offload_optimizer: Literal[False, True, "cpu", "nvme"] = Field(
        default=False,
        description="optimiser states in CPU memory (true, or cpu) or in files below nvme_path (nvme)",
        json_schema_extra={"refused": "below zero_stage=2, and nvme below 3"},
    )
    offload_parameters: Literal[False, True, "cpu", "nvme"] = Field(
        default=False,
        description="parameters in CPU memory (true, or cpu) or in files below nvme_path (nvme)",
        json_schema_extra={"refused": "below zero_stage=3"},
    )
    nvme_path: str | None = Field(
        default=None,
        description="folder on a fast disk of every machine, for what is offloaded to nvme",
        json_schema_extra={"refused": "where nothing is offloaded to nvme"},
    )
    zero_hpz_partition_size: int = Field(
        default=1,
        ge=1,
        le=2**16,
        description="ZeRO++ (hpZ): ranks, usually the GPUs of a machine, that keep a second copy of the "
        "parameters among them, so that only the first gather of a step crosses machines; 1: none",
        json_schema_extra={
            "refused": "below zero_stage=3, where it does not divide the ranks, and with "
            "offload_parameters=nvme"
        },
    )
    zero_quantized_weights: bool = Field(
        default=False,
        description="ZeRO++ (qwZ): parameters are gathered as 8-bit integers; log-probs are those of the "
        "rounded weights",
        json_schema_extra={"refused": "below zero_stage=3, and without a GPU"},
    )
    zero_quantized_gradients: bool = Field(
        default=False,
        description="ZeRO++ (qgZ): gradients are reduced as 4-bit integers, within machines and then "
        "between them",
        json_schema_extra={"refused": "below zero_stage=3, on one machine, and without a GPU"},
    )
    sequence_parallel: int = Field(
        default=1,
        ge=1,
        description="ranks that share the tokens of a micro-batch (Ulysses): each has a slice of them, "
        "and in attention all tokens for some of the heads",
        json_schema_extra={
            "refused": "a number that does not divide the ranks and the attention heads; more than 1 for a "
            "model that mixes tokens otherwise than by attention"
        },
    )
    timeout_minutes: float = Field(
        default=30.0,
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
        for option, least in self._least_stages():
            if self.zero_stage != "auto" and self.zero_stage < least:
                value = getattr(self, option)
                raise ValueError(
                    f"parallel.{option}={str(value).lower()} needs parallel.zero_stage={least} or more; "
                    f"it is {self.zero_stage}"
                )
        self._check_nvme()
        for name, remedy in NOT_DEEPSPEEDS.items():
            if self.deepspeed.get(name, "auto") != "auto":
                raise ValueError(
                    f"parallel.deepspeed.{name} is not DeepSpeed's to decide: {remedy}; remove it"
                )
        return self

    def _least_stages(self) -> Iterator[tuple[str, int]]:
        """The options that are set and need a stage of ZeRO, with the least of it."""
        if self.offload_optimizer:
            yield "offload_optimizer", 3 if self.offload_optimizer == "nvme" else 2
        if self.offload_parameters:
            yield "offload_parameters", 3
        for option in ZERO_PLUS_PLUS:
            if getattr(self, option) != type(self).model_fields[option].default:
                yield option, 3

    def _check_nvme(self) -> None:
        offloads = ("offload_optimizer", "offload_parameters")
        option = next((name for name in offloads if getattr(self, name) == "nvme"), None)
        if option is not None and self.nvme_path is None:
            raise ValueError(
                f"parallel.{option}=nvme needs parallel.nvme_path, a folder on a fast disk that every "
                "machine has for itself"
            )
        if option is None and self.nvme_path is not None:
            raise ValueError(
                f"parallel.nvme_path={self.nvme_path} is not used: set parallel.offload_optimizer=nvme or "
                "parallel.offload_parameters=nvme, or remove it"
            )
        if self.offload_parameters == "nvme" and self.zero_hpz_partition_size > 1:
            raise ValueError(
                f"parallel.zero_hpz_partition_size={self.zero_hpz_partition_size} keeps a second copy of "
                "the parameters in memory, and DeepSpeed has none for parallel.offload_parameters=nvme; "
                "set it to 1, or offload_parameters=cpu"
            )

    @property
    def needs_stage_3(self) -> str | None:
        """The first option that is set and that only ZeRO 3 has; None if there is none."""
        return next((option for option, least in self._least_stages() if least == 3), None)
