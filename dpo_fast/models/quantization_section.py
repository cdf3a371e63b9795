"""The section `model.quantization`: options of transformers' BitsAndBytesConfig, by their names there."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, model_validator


class QuantizationSection(BaseModel):
    """Load the base model with 4 or 8 bits a weight (bitsandbytes) and train adapters on it (QLoRA)."""

    model_config = ConfigDict(extra="forbid")

    load_in_4bit: StrictBool = Field(default=False, description="4 bits a weight")
    load_in_8bit: StrictBool = Field(
        default=False,
        description="8 bits a weight (LLM.int8())",
        json_schema_extra={"refused": "with load_in_4bit; without a GPU"},
    )
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = Field(
        default="nf4",
        description="the 16 values of 4 bits: those of a normal distribution, or of a float",
        json_schema_extra={"refused": "fp4 without load_in_4bit"},
    )
    bnb_4bit_use_double_quant: StrictBool = Field(
        default=True,
        description="quantise the scales of the blocks, too: 0.4 bits a weight less",
        json_schema_extra={"refused": "false without load_in_4bit"},
    )
    bnb_4bit_compute_dtype: Literal["bf16", "fp16", "fp32"] | None = Field(
        default=None,
        description="dtype of the products; default: model.dtype",
        json_schema_extra={"refused": "without load_in_4bit"},
    )
    llm_int8_skip_modules: list[str] | None = Field(
        default=None,
        description="names of modules that stay as they are; the head does in any case",
    )
    llm_int8_threshold: float = Field(
        default=6.0,
        ge=0,
        description="inputs beyond it are multiplied in 16 bits",
        json_schema_extra={"refused": "without load_in_8bit"},
    )

    @property
    def bits(self) -> int:
        """Bits of a weight."""
        return 4 if self.load_in_4bit else 8

    @model_validator(mode="after")
    def _check(self) -> QuantizationSection:
        four, eight = self.load_in_4bit, self.load_in_8bit
        if four == eight:
            raise ValueError(
                f"model.quantization: load_in_4bit={str(four).lower()} and "
                f"load_in_8bit={str(eight).lower()}; set one of them to true"
            )
        for name, field in type(self).model_fields.items():
            owner = "load_in_4bit" if name.startswith("bnb_4bit") else None
            owner = "load_in_8bit" if name == "llm_int8_threshold" else owner
            if owner and not getattr(self, owner) and getattr(self, name) != field.default:
                raise ValueError(
                    f"model.quantization.{name}={getattr(self, name)} is an option of {owner}, which is "
                    "not set; remove it"
                )
        return self
