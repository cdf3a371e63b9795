"""The section `generate` of a configuration: held-out prompts that are answered during training."""

from __future__ import annotations

from pydantic import BaseModel, Field, model_validator

from dpo_fast.generation.config import EngineSection, SampleSection
from dpo_fast.judging.config import JudgeSection
from dpo_fast.training.sections import FORBID

HELD_OUT = "the evaluation data"
FACTS = ("tokens", "finished", "distinct_1", "distinct_2")  # of answers, whoever judges them


class GenerateSection(BaseModel):
    """Held-out prompts that are answered before, during and after training (docs/TRAINING.md)."""

    model_config = FORBID

    max_prompts: int = Field(
        default=0,
        ge=0,
        le=100_000,
        description="so many distinct prompts of the evaluation data, chosen by seed; 0: none is answered",
        json_schema_extra={
            "refused": "without data.eval and data.eval_rows; with log.eval_texts=0"
        },
    )
    steps: int | None = Field(
        default=None, ge=1, description="optimiser steps between; default: at the start and the end"
    )
    max_new_tokens: int = Field(default=256, ge=1, description="tokens of an answer, at most")
    temperature: float = Field(
        default=1.0,
        ge=0,
        le=100,
        description="of a second answer, drawn by seed, beside the greedy one; 0: the greedy one alone",
    )
    top_p: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="nucleus sampling of the second answer",
        json_schema_extra={"refused": "with temperature 0"},
    )
    seed: int = Field(
        default=0, ge=0, lt=2**32, description="seed of the choice of prompts and of draws"
    )
    batch_size: int = Field(
        default=32,
        ge=1,
        description="answers that are written at a time; another size rounds in other ways",
    )
    judge: JudgeSection | None = Field(
        default=None,
        description="what scores the answers, as the section judge of dpo-fast judge: then win rates "
        "against the answers of the start and against the chosen ones are measured",
        json_schema_extra={"refused": "type implicit, and samples"},
    )

    first_answers: str | None = Field(
        default=None,
        description="generations.jsonl of an earlier run: its first answers to the same prompts are "
        "compared with, too. The later stages of `iterate` take that of the first stage",
        json_schema_extra={"refused": "without judge"},
    )

    @model_validator(mode="after")
    def _check(self) -> GenerateSection:
        fields = type(self).model_fields
        given = [name for name in fields if getattr(self, name) != fields[name].default]
        if given and not self.max_prompts:
            raise ValueError(
                f"generate.{given[0]} is not used: set generate.max_prompts, the number of prompts that "
                "are answered"
            )
        if self.temperature == 0 and "top_p" in self.model_fields_set and self.top_p != 1:
            raise ValueError(
                f"generate.top_p={self.top_p} is not used with generate.temperature=0, which draws "
                "nothing; remove it"
            )
        if self.first_answers is not None and self.judge is None:
            raise ValueError(
                f"generate.first_answers={self.first_answers} is not used without generate.judge, which "
                "compares; set it, or remove it"
            )
        if self.judge is not None and self.judge.type == "implicit":
            raise ValueError(
                "generate.judge.type=implicit is the reward of a policy that stays, and this one is "
                "trained; choose rule, command, openai or reward_model"
            )
        if self.judge is not None and self.judge.samples is not None:
            raise ValueError(
                f"generate.judge.samples={self.judge.samples} is not used: the answers of the run are "
                "judged; remove it"
            )
        return self

    @property
    def metrics(self) -> list[str]:
        """What `metric_for_best_model` may name, without `generate/`."""
        names = [*FACTS, *(["score"] if self.judge else [])]
        names += [f"sampled_{name}" for name in names if self.temperature]
        if self.judge is None:
            return names
        others = ("start", "chosen", *(["first"] if self.first_answers else []))
        return [*names, *(f"win_rate_{other}" for other in others)]

    @property
    def draws(self) -> dict[str, SampleSection]:
        """How each kind of answer is written, by its name."""
        engine = EngineSection(batch_size=self.batch_size)
        shared = {"prompts": HELD_OUT, "num_generations": 1, "seed": self.seed, "engine": engine}
        shared["max_new_tokens"] = self.max_new_tokens
        greedy = {"greedy": SampleSection(temperature=0, **shared)}
        if not self.temperature:
            return greedy
        drawn = SampleSection(temperature=self.temperature, top_p=self.top_p, **shared)
        return greedy | {"sampled": drawn}


def check_generate(section: GenerateSection, config) -> None:
    """What the section cannot go together with. config: the run. Raises ValueError."""
    if not config.data.has_eval:
        raise ValueError(
            "generate answers held-out prompts, and there are none: set data.eval or data.eval_rows"
        )
    if config.log.eval_texts == 0:
        raise ValueError(
            "generate keeps answers in the run's folder, and log.eval_texts=0 says that texts may not lie "
            "there; remove one of them"
        )
    if config.model.torch_compile:
        raise ValueError(
            "model.torch_compile=true would compile the layers again for every length of an answer; leave "
            "it out, or leave generate out and sample from the checkpoints with dpo-fast sample"
        )
    if section.max_new_tokens >= config.data.max_length:
        raise ValueError(
            f"generate.max_new_tokens={section.max_new_tokens} leaves no room for a prompt within "
            f"data.max_length={config.data.max_length}; lower it"
        )
