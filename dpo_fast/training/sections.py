"""The sections of a configuration that belong to training: loss and train."""

from __future__ import annotations

import difflib
import os
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    create_model,
    field_validator,
    model_validator,
)

from dpo_fast.data.layouts import LAYOUTS
from dpo_fast.losses import LossOptions, Objective
from dpo_fast.losses.custom import known_names, spec_of
from dpo_fast.training.optimisers import ALIASES, OPTIMISERS
from dpo_fast.training.schedule import (
    FOLLOW_A_METRIC,
    WITHOUT_WARM_UP,
    Schedule,
    check_name,
    read_numbers,
)
from dpo_fast.training.selection import default_save_steps

FORBID = ConfigDict(extra="forbid", allow_inf_nan=False)


class _Losses(BaseModel):
    """One loss or a weighted sum of several, and their options (docs/LOSSES.md)."""

    model_config = FORBID

    type: str | list[str] = Field(
        default="sigmoid",
        description="a name of the loss table, or several; or a function of your own, as "
        "module:function or FILE.py:function",
    )
    weights: list[float] | None = Field(default=None, description="one per loss; default: all 1")

    @property
    def names(self) -> tuple[str, ...]:
        return (self.type,) if isinstance(self.type, str) else tuple(self.type)

    @property
    def objective(self) -> Objective:
        """The weighted sum. Raises ValueError for values that do not go together."""
        weights = tuple(self.weights) if self.weights is not None else (1.0,) * len(self.names)
        options = {field.name: getattr(self, field.name) for field in fields(LossOptions)}
        return Objective(self.names, weights, LossOptions(**options))

    @model_validator(mode="after")
    def _check(self) -> _Losses:
        for name in self.names:
            if spec_of(name) is None:
                known = known_names()
                near = difflib.get_close_matches(name, known, 1)
                hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(known)}"
                if name.lower() == "dpo":
                    hint = "the loss of DPO is called sigmoid"
                raise ValueError(f"loss.type={name}: {hint}")
        _ = self.objective  # checks the values
        return self


if TYPE_CHECKING:

    class LossSection(_Losses, LossOptions):  # type: ignore[misc]  # which is frozen
        """What type checkers see of the class below."""

else:
    # Every option of the losses is a key of the section, with its default and meaning.
    LossSection = create_model(
        "LossSection",
        __base__=_Losses,
        **{
            field.name: (kind, Field(default=field.default, description=field.metadata["meaning"]))
            for field, kind in zip(fields(LossOptions), get_type_hints(LossOptions).values())
        },
    )


OF_PUSH = {"refused": "without train.push_to_hub"}
AT_THE_END = "end"
MICRO_BATCH = 4  # at most, where nobody says how large it is


class TrainSection(BaseModel):
    """The training itself. Names follow transformers' TrainingArguments where they can."""

    model_config = FORBID

    output_dir: str = Field(description="folder for metrics, checkpoints, reference and model")
    num_train_epochs: float = Field(default=1.0, gt=0, description="passes over the data")
    max_steps: int | None = Field(
        default=None,
        ge=1,
        description="optimiser steps; overrides the epochs",
        json_schema_extra={"refused": "null with data.streaming"},
    )
    global_batch_size: int = Field(
        default=64,
        ge=1,
        le=1 << 20,  # more is a slip of the finger, whose indices alone fill the memory
        description="examples of one optimiser step, over all ranks: pairs, completions or groups",
        json_schema_extra={
            "refused": "unless a multiple of micro_batch_size times the ranks; 1 with a loss that "
            "estimates kl; above data.stream_buffer with data.streaming"
        },
    )
    micro_batch_size: int | None = Field(
        default=None,
        ge=1,
        description="examples of one forward on one rank; default: the most, up to 4, that divide a rank's "
        "share of global_batch_size, or what tokens_per_batch holds",
        json_schema_extra={"refused": "beside tokens_per_batch"},
    )
    tokens_per_batch: int | None = Field(
        default=None,
        ge=1,
        description="in place of micro_batch_size: at most so many tokens in one forward on one rank, "
        "padding included; filled with whole examples, so a step has about global_batch_size of them",
        json_schema_extra={
            "refused": "beside micro_batch_size; with a stream, if it may not hold every row"
        },
    )
    group_prompts: bool = Field(
        default=False,
        description="bring the examples of one prompt into one micro-batch, which computes the prompt and "
        "every answer once; a step then has fewer prompts",
    )
    learning_rate: float | None = Field(
        default=None,
        gt=0,
        le=100,
        description="peak rate; default 5e-7, with LoRA 5e-6; of sft alone 2e-5 and 2e-4. AdamW moves a "
        "weight by about the rate",
    )
    lr_scheduler_type: str = Field(
        default="cosine",
        description="a name of transformers.get_scheduler",
        json_schema_extra={"refused": " and ".join(FOLLOW_A_METRIC) + ", which follow a metric"},
    )
    lr_scheduler_kwargs: dict[str, Any] = Field(
        default_factory=dict,
        description="numbers of the schedule: min_lr, min_lr_rate, num_decay_steps, lr_end, ...",
        json_schema_extra={
            "refused": "those that the schedule does not take, and rates outside of 0 to learning_rate"
        },
    )
    warmup_ratio: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="share of the steps for warm-up",
        json_schema_extra={"refused": "with constant, which has none"},
    )
    warmup_steps: int | None = Field(
        default=None,
        ge=0,
        description="steps for warm-up, in place of warmup_ratio",
        json_schema_extra={"refused": "beside warmup_ratio; with constant, which has none"},
    )
    optim: Literal[tuple(OPTIMISERS)] = Field(
        default="auto",
        description="which AdamW, by transformers' names; "
        + "; ".join(f"{name}: {each.meaning}" for name, each in OPTIMISERS.items())
        + "; adamw_8bit is adamw_bnb_8bit",
        json_schema_extra={
            "refused": "bitsandbytes' where it is not installed, with parallel.offload_optimizer, and with "
            "optimizer_from; paged ones without a GPU"
        },
    )
    weight_decay: float = Field(
        default=0.0, ge=0, description="weight decay of matrices (AdamW); vectors have none"
    )
    adam_beta1: float = Field(
        default=0.9, ge=0, lt=1, description="decay of AdamW's mean of gradients"
    )
    adam_beta2: float = Field(
        default=0.999, ge=0, lt=1, description="decay of AdamW's mean of squared gradients"
    )
    adam_epsilon: float = Field(default=1e-8, gt=0, description="added to AdamW's denominator")
    max_grad_norm: float = Field(
        default=1.0, ge=0, description="the gradient's norm is clipped to it; 0: no clipping"
    )
    nonfinite: Literal["stop", "skip"] = Field(
        default="stop",
        description="a step whose loss or gradient is not finite is never taken; stop: it ends the run; "
        "skip: the run goes on, and counts it (nonfinite_steps)",
    )
    max_nonfinite_steps: int | None = Field(
        default=None,
        ge=1,
        description="with nonfinite=skip: so many such steps in a row end the run; default: 3",
        json_schema_extra={"refused": "with nonfinite=stop"},
    )
    seed: int = Field(
        default=42, ge=0, lt=2**32, description="seed of the order of the data and of new adapters"
    )
    layout: Literal[("auto", *LAYOUTS)] = Field(
        default="auto",
        description="how a micro-batch is laid out; "
        + "; ".join(f"{name}: {layout.meaning}" for name, layout in LAYOUTS.items())
        + "; auto: the last of these that the architecture allows",
    )
    implementation: Literal["auto", "torch", "triton", "cuda"] = Field(
        default="auto",
        description="of the head, and of the loss where a kernel computes all of it; cuda: csrc, on Hopper",
    )
    workspace_bytes: int | None = Field(
        default=None, ge=0, description="memory the head may keep; default: see linear_logp"
    )
    eval_steps: int | None = Field(
        default=None,
        ge=1,
        description="optimiser steps between evaluations; default: at the start and the end",
        json_schema_extra={"refused": "without data.eval and data.eval_rows"},
    )
    save_steps: int | None = Field(
        default=None,
        ge=1,
        description="optimiser steps between checkpoints; default: at the end only, or eval_steps where "
        "the best is sought",
        json_schema_extra={"refused": "unless a multiple of eval_steps where the best is sought"},
    )
    save_total_limit: int | None = Field(
        default=2, ge=1, description="checkpoints kept; older ones are removed. null: all are kept"
    )
    save_model: bool = Field(
        default=False,
        description="every checkpoint is also a folder that from_pretrained loads, or PEFT for an adapter; "
        "without it dpo-fast export makes one",
    )
    async_save: bool = Field(
        default=False,
        description="write checkpoints while the run goes on; takes as much host memory as a rank saves",
    )
    metric_for_best_model: str | None = Field(
        default=None,
        description="metric of an evaluation, or of answers as generate/score, with or without eval_, by "
        "which checkpoints are compared: the best stays whatever save_total_limit says. Default: loss, "
        "with load_best_model_at_end or early_stopping_patience",
        json_schema_extra={
            "refused": "without evaluation data and eval_steps, or generate.steps; unknown metrics"
        },
    )
    greater_is_better: bool | None = Field(
        default=None,
        description="whether more of it is better; default: unless its name ends with loss",
        json_schema_extra={"refused": "without a metric to compare"},
    )
    load_best_model_at_end: bool = Field(
        default=False,
        description="export the best checkpoint rather than the last",
        json_schema_extra={"refused": "without evaluation data and eval_steps"},
    )
    early_stopping_patience: int | None = Field(
        default=None,
        ge=1,
        description="evaluations in a row without an improvement after which the run ends",
        json_schema_extra={"refused": "without evaluation data and eval_steps"},
    )
    early_stopping_threshold: float = Field(
        default=0.0,
        ge=0,
        description="an improvement by this much or less is none",
        json_schema_extra={"refused": "without early_stopping_patience"},
    )
    resume_from_checkpoint: bool | str = Field(
        default=False, description="true: the latest of output_dir, if any; or the path of one"
    )
    optimizer_from: str | None = Field(
        default=None,
        description="begin with AdamW's states of this checkpoint, which must be of the same weights: "
        "training in stages that goes on with its moments. The schedule of the learning rate begins anew. "
        "A run that resumes has its own",
        json_schema_extra={"refused": "a checkpoint of other weights"},
    )
    change_on_resume: list[Literal["learning_rate"]] = Field(
        default_factory=list,
        description="options of train that may differ from the checkpoint's: learning_rate; the schedule "
        "goes on at the same step",
        json_schema_extra={"refused": "without resume_from_checkpoint"},
    )
    sampler: str | None = Field(
        default=None,
        min_length=1,
        description="code of your own that orders the examples of every epoch (docs/PYTHON.md): the name "
        "of a plugin, module:function or FILE.py:function; default: a seeded permutation",
        json_schema_extra={
            "refused": "with tokens_per_batch, group_prompts, data.streaming and mixtures, which order "
            "examples themselves"
        },
    )
    callbacks: list[str | dict[str, dict[str, Any]]] = Field(
        default_factory=list,
        description="code of your own that sees the run and may end it (docs/PYTHON.md): the name of a "
        "plugin, module:Class or FILE.py:Class; or one of these with options, as in "
        "{FILE.py:Class: {after: 5}}",
        json_schema_extra={"refused": "code that cannot be loaded, or is no callback"},
    )
    skip_rows: list[str] = Field(
        default_factory=list,
        description="rows of data.train that no batch holds, named by file and line as messages name them; "
        "the steps of all other rows stay as they are",
    )
    push_to_hub: bool = Field(
        default=False,
        description="upload the trained model and its card to the Hugging Face hub at the end; the token "
        "is HF_TOKEN or that of `hf auth login`",
    )
    hub_model_id: str | None = Field(
        default=None,
        description="repository, a name or OWNER/NAME; default: the name of output_dir",
        json_schema_extra=OF_PUSH,
    )
    hub_private_repo: bool | None = Field(
        default=None,
        description="whether a new repository is private; default: as its owner's settings say",
        json_schema_extra=OF_PUSH,
    )
    hub_revision: str | None = Field(
        default=None,
        min_length=1,
        description="branch, made if there is none; default: the main one",
        json_schema_extra=OF_PUSH,
    )
    hub_strategy: Literal["end", "every_save", "checkpoint", "all_checkpoints"] = Field(
        default=AT_THE_END,
        description="what is uploaded while the run goes on; end: nothing; every_save: the model of every "
        "checkpoint; checkpoint: and the newest checkpoint, to the folder last-checkpoint; "
        "all_checkpoints: and each checkpoint, to a folder of its name. All but end set save_model",
        json_schema_extra={
            "refused": "without train.push_to_hub; all but end with save_model=false"
        },
    )
    overwrite_output_dir: bool = Field(
        default=False,
        description="begin again in a folder that holds a run: its checkpoints, its model and its answers "
        "are removed, its metrics kept as metrics-earlier.jsonl",
        json_schema_extra={"refused": "with resume_from_checkpoint"},
    )
    merge_lora: bool = Field(
        default=False,
        description="export merged weights beside the adapter",
        json_schema_extra={"refused": "without model.lora"},
    )
    merge_dtype: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        default="auto",
        description="dtype of the merged weights; auto: that of the base checkpoint",
        json_schema_extra={"refused": "without merge_lora"},
    )

    @property
    def schedule(self) -> Schedule:
        """The schedule of the learning rate."""
        name, numbers = self.lr_scheduler_type, self.lr_scheduler_kwargs
        return Schedule(name, numbers, self.warmup_ratio, self.warmup_steps)

    @property
    def nonfinite_limit(self) -> int:
        """So many steps in a row that are not finite end the run."""
        return 1 if self.nonfinite == "stop" else self.max_nonfinite_steps or 3

    @property
    def head(self) -> dict[str, Any]:
        """Options of the scoring head of every model of the run."""
        return {"implementation": self.implementation, "workspace_bytes": self.workspace_bytes}

    @field_validator("optim", mode="before")
    @classmethod
    def _optim(cls, value: Any) -> Any:
        return ALIASES.get(value, value) if isinstance(value, str) else value

    @field_validator("callbacks", mode="before")
    @classmethod
    def _callbacks(cls, value: Any) -> Any:
        """One is a list of it."""
        listed = [value] if isinstance(value, (str, dict)) else value
        for each in listed if isinstance(listed, list) else ():
            if isinstance(each, dict) and len(each) != 1:
                raise ValueError(
                    f"train.callbacks={each}: expected one name with its options, as in "
                    "{my_code.py:StopAt: {loss: 0.1}}"
                )
        return listed

    @field_validator("lr_scheduler_kwargs")
    @classmethod
    def _numbers(cls, given: dict[str, Any]) -> dict[str, Any]:
        return read_numbers(given)

    @field_validator("resume_from_checkpoint", mode="before")
    @classmethod
    def _nothing(cls, value: Any) -> Any:
        """null, the default of transformers, is no checkpoint either."""
        return False if value is None else value

    @field_validator("output_dir", "resume_from_checkpoint", "optimizer_from")
    @classmethod
    def _folder(cls, value: bool | str | None, info: ValidationInfo) -> bool | str | None:
        """Expand `~`, as in every other path."""
        if value is None or isinstance(value, bool):
            return value
        if not value.strip():
            raise ValueError(f"train.{info.field_name}={value!r} names no folder; give one")
        return str(Path(os.path.expanduser(value)))

    @model_validator(mode="after")
    def _check(self) -> TrainSection:
        self._check_hub()
        if self.overwrite_output_dir and self.resume_from_checkpoint:
            raise ValueError(
                "train.overwrite_output_dir=true removes what "
                f"train.resume_from_checkpoint={self.resume_from_checkpoint} goes on from; leave out one"
            )
        if self.max_nonfinite_steps is not None and self.nonfinite == "stop":
            raise ValueError(
                f"train.max_nonfinite_steps={self.max_nonfinite_steps} is not used with "
                "train.nonfinite=stop; set train.nonfinite=skip, or remove it"
            )
        if self.change_on_resume and not self.resume_from_checkpoint:
            raise ValueError(
                f"train.change_on_resume={self.change_on_resume} is for a run that goes on; set "
                "train.resume_from_checkpoint too, or remove it"
            )
        check_name(self.lr_scheduler_type)
        self._check_warm_up()
        self.save_steps = default_save_steps(self)
        if self.micro_batch_size is not None and self.tokens_per_batch is not None:
            raise ValueError(
                f"train.tokens_per_batch={self.tokens_per_batch} and train.micro_batch_size="
                f"{self.micro_batch_size} both say how large a micro-batch is; remove one of them"
            )
        for name in ("tokens_per_batch", "group_prompts"):
            if self.sampler and (value := getattr(self, name)):
                raise ValueError(
                    f"train.sampler={self.sampler} orders the examples, and train.{name}={value} brings "
                    "them into another order; remove one of them"
                )
        if self.tokens_per_batch is None and self.micro_batch_size is None:
            self.micro_batch_size = MICRO_BATCH
            self.model_fields_set.discard("micro_batch_size")  # filled in, not chosen
        return self

    def _check_hub(self) -> None:
        """Options of a push need one, and a model that is pushed while the run goes on is saved first."""
        hub = ("hub_model_id", "hub_private_repo", "hub_revision", "hub_strategy")
        unused = next((name for name in hub if getattr(self, name) not in (None, AT_THE_END)), None)
        if unused and not self.push_to_hub:
            raise ValueError(
                f"train.{unused}={getattr(self, unused)} is not used: set train.push_to_hub=true, or "
                "remove it"
            )
        if self.hub_strategy == AT_THE_END or self.save_model:
            return
        if "save_model" in self.model_fields_set:
            raise ValueError(
                f"train.hub_strategy={self.hub_strategy} uploads the model of every checkpoint, and "
                "train.save_model=false leaves it out: remove save_model, or set hub_strategy=end"
            )
        self.save_model = True
        self.model_fields_set.discard("save_model")  # filled in, not chosen

    def _check_warm_up(self) -> None:
        """One of two options says how long it is; a schedule without a warm-up has none."""
        # A resolved run has the usual share beside the steps.
        usual = type(self).model_fields["warmup_ratio"].default
        if self.warmup_steps is not None and self.warmup_ratio != usual:
            raise ValueError(
                f"train.warmup_steps={self.warmup_steps} and train.warmup_ratio={self.warmup_ratio} both "
                "say how long the warm-up is; remove one of them"
            )
        if self.lr_scheduler_type not in WITHOUT_WARM_UP:
            return
        if self.warmup_steps or "warmup_ratio" in self.model_fields_set and self.warmup_ratio:
            raise ValueError(
                f"{self.schedule.asked} is not used by train.lr_scheduler_type="
                f"{self.lr_scheduler_type}; choose constant_with_warmup, or remove it"
            )
        self.warmup_ratio = 0.0
        self.model_fields_set.discard("warmup_ratio")
