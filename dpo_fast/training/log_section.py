"""The section `log` of a configuration: metrics.jsonl, and loggers beside it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field, field_validator, model_validator

from dpo_fast.training.sections import FORBID

NO_LOGGER = "none"
OTHER_NAMES = {"comet": "comet_ml"}
OF_LOGGERS = {"refused": "without log.report_to"}


class LogSection(BaseModel):
    """What is written while training."""

    model_config = FORBID

    logging_steps: int = Field(default=10, ge=1, description="steps between lines of metrics.jsonl")
    token_metrics: bool = Field(
        default=True,
        description="entropy, mean logits and token accuracy, from the head's own pass",
    )
    report_to: list[Literal["tensorboard", "wandb", "mlflow", "trackio", "comet_ml", "csv"]] = (
        Field(
            default_factory=list,
            description="loggers that also receive the metrics, the configuration and the findings",
        )
    )
    eval_texts: int = Field(
        default=8,
        ge=0,
        le=100,
        description="texts of so many evaluation examples with the least margin, and as many with the "
        "greatest, are kept in eval-examples.json for the report; 0: none, if they are private",
    )
    run_name: str | None = Field(
        default=None,
        description="name of the run for loggers and the report; default: that of output_dir",
    )
    project: str | None = Field(
        default=None,
        min_length=1,
        description="project or experiment that holds the run in loggers; default: the variable of the "
        "client (WANDB_PROJECT, MLFLOW_EXPERIMENT_NAME, COMET_PROJECT_NAME, TRACKIO_PROJECT), or dpo_fast",
        json_schema_extra=OF_LOGGERS,
    )
    tags: list[str] = Field(
        default_factory=list, description="tags of the run in loggers", json_schema_extra=OF_LOGGERS
    )
    notes: str | None = Field(
        default=None, description="what the run is about, for loggers", json_schema_extra=OF_LOGGERS
    )
    group: str | None = Field(
        default=None,
        description="runs that belong together in loggers",
        json_schema_extra=OF_LOGGERS,
    )
    log_completions: bool = Field(
        default=False,
        description="send the answers of generate to the loggers, too, as tables; they are texts of "
        "held-out prompts",
        json_schema_extra={"refused": "without log.report_to or generate.max_prompts"},
    )

    @field_validator("report_to", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        """One name is a list of it, and `none` an empty one, as in transformers' TrainingArguments."""
        names = [] if value in (NO_LOGGER, [NO_LOGGER], None) else value
        names = [names] if isinstance(names, str) else names
        if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            return value
        return list(dict.fromkeys(OTHER_NAMES.get(name, name) for name in names))

    @field_validator("tags", mode="before")
    @classmethod
    def _one_tag(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _used(self) -> LogSection:
        named = ("project", "tags", "notes", "group", "log_completions")
        if not self.report_to and (unused := next((n for n in named if getattr(self, n)), None)):
            raise ValueError(
                f"log.{unused}={getattr(self, unused)} is not used: name a logger in log.report_to, or "
                "remove it"
            )
        return self
