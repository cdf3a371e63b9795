"""The section `reference` of the configuration: its options, the models it names, and what they go with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dpo_fast.losses import LOSSES, Objective
from dpo_fast.models.config import ModelPath, ModelSection
from dpo_fast.models.hub import with_revision
from dpo_fast.references.table import (
    DEFAULT,
    PROVIDERS,
    ProviderSpec,
    alternatives,
    default_provider,
    refusals,
)


@dataclass(frozen=True)
class ReferenceModel:
    """A model whose log-probs a run compares with.

    path: folder or hub id; None: the policy as it starts.
    option: the configuration key that names it.
    per_token: the log-prob of every token is stored beside the sums.
    cache_dir: folder of its stored log-probs; None: output_dir/reference.
    """

    path: str | None
    option: str
    per_token: bool = False
    cache_dir: str | None = None

    @property
    def named_by(self) -> str:
        """The configuration key that an error about the model names."""
        return self.option if self.path else "model.path"

    def section(self, policy: ModelSection) -> ModelSection:
        """How it is loaded: as the policy, but without adapters and without recomputed activations."""
        unused = dict.fromkeys(("lora", "adapter", "gradient_checkpointing", "checkpoint_layers"))
        unused["activation_offloading"] = False
        return policy.model_copy(update={"path": self.path or policy.path, **unused})


def _used_only_by(option: str) -> dict[str, str]:
    """What refuses an option: a provider that does not use it."""
    users = [spec.name for spec in PROVIDERS.values() if option in spec.options]
    return {"refused": f"unless provider is {' or '.join(users)}"}


class ReferenceSection(BaseModel):
    """Where the reference log-probabilities come from."""

    model_config = ConfigDict(extra="forbid")

    provider: Literal[tuple(PROVIDERS)] = Field(
        default=DEFAULT,
        description="; ".join(f"{spec.name}: {spec.meaning}" for spec in PROVIDERS.values())
        + f". Default: {default_provider(False, False, False)} for a loss without a reference; for a loss "
        f"that estimates kl {default_provider(True, True, False)}, or "
        f"{default_provider(True, True, True)} with LoRA; else {DEFAULT}",
        json_schema_extra={"refused": refusals()},
    )
    path: ModelPath | None = Field(
        default=None,
        description="reference model, a folder or a hub id, also as org/name@revision; default: the policy "
        "as it starts",
        json_schema_extra=_used_only_by("path"),
    )
    revision: str | None = Field(
        default=None,
        description="branch, tag or commit of the hub id in path; default: main",
        json_schema_extra={"refused": "without path, or where path is a folder or names one"},
    )
    cache_dir: str | None = Field(
        default=None,
        description="stored references: one folder of them, or one with several below it. It may serve "
        "a run with other data whose rows are all in it. Default: output_dir/reference, by content",
        json_schema_extra=_used_only_by("cache_dir"),
    )
    per_token: bool = Field(
        default=False,
        description="store the log-prob of every token beside the sums",
        json_schema_extra=_used_only_by("per_token"),
    )
    offload: bool | None = Field(
        default=None,
        description="parameters of a second model wait in CPU memory between uses, at ZeRO stage 3; "
        "default: as parallel.offload_parameters",
        json_schema_extra={
            "refused": "true without a second model, and below parallel.zero_stage=3"
        },
    )
    old_path: ModelPath | None = Field(
        default=None,
        description="model that wrote the completions of groups; default: the policy as it starts. Its "
        "log-probs are stored once, in output_dir/reference",
        json_schema_extra={
            "refused": "unless a loss goes by tokens: "
            + ", ".join(name for name, spec in LOSSES.items() if spec.by_token)
        },
    )
    mixup_alpha: float = Field(
        default=0.6,
        gt=0,
        le=1,
        description="share of the policy in the new reference; 1 copies the policy",
        json_schema_extra=_used_only_by("mixup_alpha"),
    )
    sync_steps: int = Field(
        default=512,
        ge=1,
        description="optimiser steps between updates of the reference",
        json_schema_extra=_used_only_by("sync_steps"),
    )

    @model_validator(mode="before")
    @classmethod
    def _fold_revision(cls, values: Any) -> Any:
        return with_revision(values, option="reference")

    @property
    def model(self) -> ReferenceModel:
        """The reference model. Only providers that load or store one ask for it."""
        return ReferenceModel(self.path, "reference.path", self.per_token, self.cache_dir)

    @property
    def old_model(self) -> ReferenceModel:
        """The model that wrote the completions; grpo and dapo want its log-probs of every token."""
        stored = PROVIDERS[self.provider].stores
        if stored and self.per_token and self.path == self.old_path:
            return self.model
        return ReferenceModel(self.old_path, "reference.old_path", per_token=True)


def check_reference(
    section: ReferenceSection, spec: ProviderSpec, objective: Objective, adapters: bool
) -> None:
    """Check that provider and options go with the losses and with the policy.

    spec: of the provider that the run uses.
    adapters: whether the policy has adapters.

    Raises:
        ValueError: naming the option, its value and the remedy.
    """
    losses = ", ".join(objective.names)
    if objective.needs_reference and not spec.compares:
        raise ValueError(
            f"reference.provider={spec.name}, but loss.type={losses} compares with a reference; choose "
            f"{alternatives(lambda other: other.compares)}"
        )
    if spec.needs_adapters and not adapters:
        raise ValueError(
            f"reference.provider={spec.name} needs adapters: set model.lora, or choose "
            f"{alternatives(lambda other: other.compares and not other.needs_adapters)}"
        )
    _check_options(section, spec, objective)
    _check_scores(section, spec, objective)


def _check_options(section: ReferenceSection, spec: ProviderSpec, objective: Objective) -> None:
    """An option that the provider or the losses do not use is a mistake."""
    of_providers = {option for other in PROVIDERS.values() for option in other.options}
    for option, field in ReferenceSection.model_fields.items():
        value = getattr(section, option)
        unused = option in of_providers and option not in spec.options
        if unused and value != field.default:
            users = alternatives(lambda other, option=option: option in other.options)
            value = str(value).lower() if isinstance(value, bool) else value
            raise ValueError(
                f"reference.{option}={value} is not used by reference.provider={spec.name}; leave it "
                f"out, or set provider={users}"
            )
    if section.old_path is not None and not objective.needs_old_tokens:
        raise ValueError(
            f"reference.old_path={section.old_path} is not used by loss.type="
            f"{', '.join(objective.names)}, which does not ask what wrote the completions; leave it out"
        )


def _check_scores(section: ReferenceSection, spec: ProviderSpec, objective: Objective) -> None:
    """Some losses compare token by token, or need log-probs of sequences that are not in the data."""
    if objective.needs_reference_tokens and not spec.gives_tokens(section.per_token):
        stored = alternatives(lambda other: other.tokens == "stored")
        always = alternatives(lambda other: other.tokens == "always")
        raise ValueError(
            "loss.token_clamp, loss.ld_alpha and loss.grpo_beta compare with the reference token by "
            f"token: set reference.per_token=true with provider={stored}, or choose {always}; or, for "
            "ld_alpha, loss.ld_reference=false to leave the reference's sums as they are"
        )
    estimates_kl = "kl" in objective.statistics and objective.needs_reference
    if estimates_kl and not spec.any_sequence:
        raise ValueError(
            f"reference.provider={spec.name} holds the data's own sequences, and loss.type="
            f"{', '.join(objective.names)} estimates kl from completions after the prompts of other "
            f"rows, drawn anew in every step; choose {alternatives(lambda other: other.any_sequence)}"
        )
