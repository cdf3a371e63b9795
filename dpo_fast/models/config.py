"""The sections `model` and `model.lora` of the configuration."""

from __future__ import annotations

import os
from typing import Annotated, Literal

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictInt, model_validator

from dpo_fast.models.precision import DTYPES, choose_dtype

ModelPath = Annotated[str, AfterValidator(os.path.expanduser)]  # a folder, or a hub id


class LoraSection(BaseModel):
    """Train low-rank adapters (peft) and freeze the rest."""

    model_config = ConfigDict(extra="forbid")

    r: int = Field(16, ge=1, description="rank of the adapters")
    alpha: int = Field(32, ge=1, description="adapters are scaled by alpha / r")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout before the adapters")
    target_modules: str | list[str] = Field(
        "all-linear",
        description="names of modules that get adapters, or all-linear (not the head)",
        json_schema_extra={"refused": "the head"},
    )


class ModelSection(BaseModel):
    """Which model is trained, and how its forward runs."""

    model_config = ConfigDict(extra="forbid")

    path: ModelPath = Field(description="a model folder as written by save_pretrained, or a hub id")
    tokenizer: ModelPath | None = Field(
        None, description="tokenizer folder or hub id; default: path"
    )
    dtype: Literal["auto", "bf16", "fp32"] = Field(
        "auto",
        description="dtype of weights and activations; auto: bf16 on a GPU, and on a CPU that has "
        "instructions for its products (AVX512_BF16, AMX, Arm's BF16), else fp32",
    )
    attention: str = Field(
        "auto",
        description="attention implementation of transformers (sdpa, eager, flash_attention_2, ...); "
        "auto: sdpa where every sequence has a row of its own; where sequences share a row, a varlen "
        "kernel or else flex_attention on a GPU, and SDPA sequence by sequence on a CPU",
    )
    gradient_checkpointing: bool | None = Field(
        None, description="recompute activations in backward; default: above 1e9 parameters"
    )
    checkpoint_layers: StrictInt | list[StrictInt] | None = Field(
        None,
        description="decoder layers whose activations are recomputed: a number means the first so "
        "many, a list the layers of these indices; default: all. Turns gradient_checkpointing on",
        json_schema_extra={"refused": "with gradient_checkpointing=false"},
    )
    use_liger_kernel: bool = Field(
        False,
        description="liger-kernel's RMSNorm, RoPE and MLP in place of the model's",
        json_schema_extra={"refused": "with torch_compile; without a GPU"},
    )
    torch_compile: bool = Field(
        False,
        description="compile the blocks of the decoder layers with torch.compile",
        json_schema_extra={"refused": "with use_liger_kernel; with parallel.zero_stage=3"},
    )
    trust_remote_code: bool = Field(False, description="run code that comes with the model")
    lora: LoraSection | None = Field(None, description="train adapters instead of the model")

    @property
    def precision(self) -> str:
        """bf16 or fp32: `dtype`, or what `auto` means on this machine."""
        return choose_dtype(self.dtype).name

    @property
    def torch_dtype(self) -> torch.dtype:
        """`precision` as PyTorch has it."""
        return DTYPES[self.precision]

    @model_validator(mode="after")
    def _check(self) -> ModelSection:
        layers = self.checkpoint_layers
        if layers is not None and self.gradient_checkpointing is False:
            raise ValueError(
                f"model.checkpoint_layers={layers} chooses layers to recompute, but "
                "model.gradient_checkpointing=false; remove one of them"
            )
        if layers == [] or (
            min(layers) < 0 if isinstance(layers, list) else layers is not None and layers < 1
        ):
            raise ValueError(
                f"model.checkpoint_layers={layers}: expected how many layers, 1 or more, or a list of "
                "indices from 0; to recompute none set model.gradient_checkpointing=false"
            )
        if self.use_liger_kernel and self.torch_compile:
            raise ValueError(
                "model.use_liger_kernel=true and model.torch_compile=true fuse the same operations; "
                "choose one"
            )
        return self
