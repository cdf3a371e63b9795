"""The section `model.lora` of the configuration. Its options have the names of peft's LoraConfig."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, field_validator, model_validator

# Starts that take a part out of the base weight and train it (`models/lora_start.py`).
TAKES_FROM_BASE = re.compile(r"pissa(_niter_[1-9]\d*)?|olora")
KNOWN_STARTS = ("gaussian", "orthogonal", "pissa", "pissa_niter_N", "olora")
# Starts of peft that are made by a pass over data or by quantising, before training.
OTHER_STARTS = ("eva", "corda", "lora_ga", "loftq", "mica")


class LoraSection(BaseModel):
    """Train low-rank adapters (peft) and freeze the rest."""

    model_config = ConfigDict(extra="forbid")

    r: int = Field(default=16, ge=1, description="rank of the adapters")
    alpha: int = Field(default=32, ge=1, description="adapters are scaled by alpha / r")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="dropout before the adapters")
    target_modules: str | list[str] = Field(
        default="all-linear",
        description="names of modules that get adapters, or all-linear: layers that learn from texts, not "
        "the head",
        json_schema_extra={"refused": "the head"},
    )
    target_parameters: list[str] | None = Field(
        default=None,
        description="names of parameters that get adapters, as peft has them, for experts that lie in one "
        "tensor: [experts.gate_up_proj, experts.down_proj]",
        json_schema_extra={"refused": "names of no parameter of a layer; with dropout"},
    )
    modules_to_save: list[str] | None = Field(
        default=None,
        description="modules that are trained whole beside the adapters and saved with them, such as norm, "
        "embed_tokens or lm_head; embeddings and head that share a weight go on sharing it",
        json_schema_extra={
            "refused": "modules that no text goes through, or with buffers that are stored; one inside "
            "another; with target_modules that name the same"
        },
    )
    exclude_modules: str | list[str] | None = Field(
        default=None,
        description="names of modules that get no adapters though target_modules means them, or a regular "
        "expression",
        json_schema_extra={"refused": "names of no module"},
    )
    layers_to_transform: int | list[int] | None = Field(
        default=None,
        description="indices of the decoder layers that get adapters; default: all",
        json_schema_extra={"refused": "indices that the model lacks; with a regular expression"},
    )
    layers_pattern: str | list[str] | None = Field(
        default=None,
        description="name of the list of decoder layers, where it is none of the usual ones",
        json_schema_extra={"refused": "without layers_to_transform"},
    )
    rank_pattern: dict[str, int] = Field(
        default={},
        description="ranks of some modules, by name or regular expression: {q_proj: 32}",
        json_schema_extra={"refused": "names of no module with an adapter"},
    )
    alpha_pattern: dict[str, int] = Field(
        default={},
        description="alpha of some modules, by name or regular expression",
        json_schema_extra={"refused": "names of no module with an adapter"},
    )
    use_rslora: bool = Field(
        default=False, description="adapters are scaled by alpha / sqrt(r) (rsLoRA)"
    )
    use_dora: bool = Field(
        default=False,
        description="train the length of each row of a weight beside its direction (DoRA)",
        json_schema_extra={
            "refused": "with target_parameters, or target_modules that name experts; with pissa or olora"
        },
    )
    init_lora_weights: StrictBool | str = Field(
        default=True,
        description="how adapters start. true: B is zero; gaussian: and A normal; orthogonal; pissa, "
        "pissa_niter_N (a fast SVD in N iterations) and olora: with the principal part of each weight, and "
        "the export is an adapter of twice the rank on the base as it was",
        json_schema_extra={"refused": f"false, {', '.join(OTHER_STARTS)}"},
    )
    bias: Literal["none", "all", "lora_only"] = Field(
        default="none",
        description="biases that are trained beside the adapters: none, those of all layers, or of those "
        "with adapters",
        json_schema_extra={
            "refused": "all and lora_only with a reference that is the model with its adapters off"
        },
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = Field(
        default=None,
        description="rows of the embeddings that are trained, by token id, such as those of new tokens; or "
        "by the name of the embeddings",
        json_schema_extra={"refused": "where the head shares the embeddings' weight"},
    )

    @property
    def trains_biases(self) -> bool:
        """Whether biases of the base model are trained."""
        return self.bias != "none"

    @property
    def takes_from_base(self) -> bool:
        """Whether adapters start with a part of the weight that they are on."""
        how = self.init_lora_weights
        return isinstance(how, str) and TAKES_FROM_BASE.fullmatch(how) is not None

    @field_validator("init_lora_weights")
    @classmethod
    def _check_start(cls, how: bool | str) -> bool | str:
        known = how in KNOWN_STARTS or TAKES_FROM_BASE.fullmatch(str(how))
        if how is True or (known and how != "pissa_niter_N"):
            return how
        reasons = {
            "false": "the policy would begin with random adapters, far from its reference",
            "mica": "it trains one half of each adapter only",
            "loftq": "it needs weights that it quantises itself",
        } | dict.fromkeys(("eva", "corda", "lora_ga"), "it needs a pass over data before the run")
        reason = reasons.get(str(how).lower(), "there is no such start")
        raise ValueError(
            f"model.lora.init_lora_weights={str(how).lower()}: {reason}; choose true, "
            f"{', '.join(KNOWN_STARTS)}"
        )

    @model_validator(mode="after")
    def _check(self) -> LoraSection:
        start = f"model.lora.init_lora_weights={self.init_lora_weights}"
        if self.target_parameters and (self.takes_from_base or self.use_dora):
            option = start if self.takes_from_base else "model.lora.use_dora=true"
            raise ValueError(
                f"{option} is for layers, and model.lora.target_parameters={self.target_parameters} puts "
                "adapters on tensors of experts; remove one of them"
            )
        if self.use_dora and self.takes_from_base:
            raise ValueError(
                f"model.lora.use_dora=true and {start} each take the weight apart in a way of their own; "
                "choose one"
            )
        if self.init_lora_weights == "orthogonal":
            odd = [r for r in (self.r, *self.rank_pattern.values()) if r % 2]
            if odd:
                raise ValueError(f"{start} needs even ranks, and one is {odd[0]}; raise it by 1")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                f"model.lora.layers_pattern={self.layers_pattern} is not used without "
                "model.lora.layers_to_transform; set that, or remove it"
            )
        bad = [v for v in (*self.rank_pattern.values(), *self.alpha_pattern.values()) if v < 1]
        if bad:
            raise ValueError(
                f"model.lora.rank_pattern and alpha_pattern: expected numbers of 1 or more, got {bad[0]}"
            )
        return self
