"""The sections `model` and `model.lora` of the configuration."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class LoraSection(BaseModel):
    """Train low-rank adapters (peft) and freeze the rest."""

    model_config = ConfigDict(extra="forbid")

    r: int = Field(16, ge=1, description="rank of the adapters")
    alpha: int = Field(32, ge=1, description="adapters are scaled by alpha / r")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout before the adapters")
    target_modules: str | list[str] = Field(
        "all-linear", description="names of modules that get adapters, or all-linear (not the head)"
    )


class ModelSection(BaseModel):
    """Which model is trained, and how its forward runs."""

    model_config = ConfigDict(extra="forbid")

    path: str = Field(description="a model folder as written by save_pretrained, or a hub id")
    tokenizer: str | None = Field(None, description="tokenizer folder or hub id; default: path")
    dtype: Literal["bf16", "fp32"] = Field("bf16", description="dtype of weights and activations")
    attention: str = Field(
        "auto",
        description="attention implementation of transformers (sdpa, eager, flash_attention_2, ...); "
        "auto: sdpa for padded batches; for packed ones flash_attention_2 where it runs, else SDPA "
        "sequence by sequence",
    )
    gradient_checkpointing: bool | None = Field(
        None, description="recompute activations in backward; default: above 1e9 parameters"
    )
    trust_remote_code: bool = Field(False, description="run code that comes with the model")
    lora: LoraSection | None = Field(None, description="train adapters instead of the model")
