"""The entries of `stages`: what each trains on, from where, and against which reference."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dpo_fast.training.sections import LossSection, TrainSection
from dpo_fast.wording import quoted


class StageSection(BaseModel):
    """A stage: rows that are there, or prompts that are sampled, judged and paired first."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: str | list[str | dict[str, Any]] | dict[str, Any] | None = Field(
        default=None,
        description="rows to train on, as data.train of a run; or a mapping of options of the section data",
        json_schema_extra={"refused": "beside prompts"},
    )
    prompts: str | list[str] | None = Field(
        default=None,
        description="rows with prompts, as sample.prompts: the policy answers them, the judge scores the "
        "answers, and their pairs are trained on",
        json_schema_extra={"refused": "beside data"},
    )
    rounds: int = Field(
        default=1,
        ge=1,
        le=1000,
        description="so often are the prompts sampled and trained on, each time from the policy before",
        json_schema_extra={"refused": "above 1 with data"},
    )
    start_from: Literal["previous", "start"] = Field(
        default="previous",
        description="weights that training begins from: those of the policy before, or of model.path. "
        "Answers are always sampled from the policy before",
    )
    reference: Literal["previous", "start", "ema"] = Field(
        default="previous",
        description="the model that the loss compares with. previous: the policy before this stage or "
        "round; start: that of model.path; ema: the reference before, moved towards the policy before",
        json_schema_extra={
            "refused": "where the loss compares with none; ema with adapters; beside reference.provider ema"
        },
    )
    mixup_alpha: float = Field(
        default=0.6,
        gt=0,
        le=1,
        description="with ema: share of the policy before in the new reference",
        json_schema_extra={"refused": "unless reference is ema"},
    )
    optimizer: Literal["fresh", "carried"] = Field(
        default="fresh",
        description="AdamW's means of gradients: new, or those that the stage or round before ended with",
        json_schema_extra={
            "refused": "carried in the first stage, with start_from: start, and after a stage that exports "
            "its best checkpoint"
        },
    )
    learning_rate: float | None = Field(
        default=None,
        gt=0,
        le=100,
        description="in place of train.learning_rate; the schedule begins anew in every stage and round",
        json_schema_extra={"refused": "beside learning_rate in train of the stage"},
    )
    loss: str | list[str] | dict[str, Any] | None = Field(
        default=None,
        description="options in place of those of the section loss. One that names a type, as `sft` or "
        "`{type: ipo}`, takes none of the section",
    )
    train: dict[str, Any] = Field(
        default_factory=dict, description="options in place of those of the section train"
    )
    sample: dict[str, Any] = Field(
        default_factory=dict,
        description="options in place of those of the section sample",
        json_schema_extra={"refused": "with data"},
    )
    judge: dict[str, Any] = Field(
        default_factory=dict,
        description="options in place of those of the section judge",
        json_schema_extra={"refused": "with data"},
    )
    pairs: dict[str, Any] = Field(
        default_factory=dict,
        description="options in place of those of the section pairs",
        json_schema_extra={"refused": "with data"},
    )

    @property
    def samples(self) -> bool:
        """Whether its rows are made by sampling and judging."""
        return self.prompts is not None

    @model_validator(mode="before")
    @classmethod
    def _say_where(cls, values: Any) -> Any:
        """Say where an option of a section stands that is not one of a stage."""
        for name in values if isinstance(values, dict) else ():
            for section, kind in (("train", TrainSection), ("loss", LossSection)):
                if name not in cls.model_fields and name in kind.model_fields:
                    raise ValueError(
                        f"{name} is an option of {section}: write `{section}: {{{name}: "
                        f"{quoted(values[name])}}}`"
                    )
        return values

    @model_validator(mode="after")
    def _check(self) -> StageSection:
        if (self.data is None) == (self.prompts is None):
            raise ValueError(
                "a stage has either data, rows that are there, or prompts to sample; this one has"
                f" {'both' if self.data is not None else 'neither'}"
            )
        if self.data is not None:
            self._check_data()
        if "mixup_alpha" in self.model_fields_set and self.reference != "ema":
            raise ValueError(
                f"mixup_alpha={self.mixup_alpha} is not used by reference={self.reference}; set "
                "reference: ema, or remove it"
            )
        for section, name in (("sample", "prompts"), ("judge", "samples")):
            if name in getattr(self, section):
                raise ValueError(
                    f"{section}.{name} is not for a stage, which samples its prompts and judges what it "
                    f"sampled; remove it"
                )
        if self.learning_rate is not None and "learning_rate" in self.train:
            raise ValueError(
                f"learning_rate={self.learning_rate} and train.learning_rate="
                f"{self.train['learning_rate']} of one stage say the same; remove one"
            )
        return self

    def _check_data(self) -> None:
        if isinstance(self.data, dict) and "train" not in self.data:
            raise ValueError("data is a mapping without train, which names the rows; add it")
        if self.rounds > 1:
            raise ValueError(
                f"rounds={self.rounds} samples anew each time, and a stage with data samples nothing; set "
                "train.num_train_epochs, or give prompts"
            )
        for name in ("sample", "judge", "pairs"):
            if getattr(self, name):
                raise ValueError(
                    f"{name} is for stages with prompts, and this one has data; remove it"
                )
