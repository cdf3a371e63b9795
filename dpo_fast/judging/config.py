"""The sections `judge` and `pairs`: what scores completions, and which pairs are made of them."""

from __future__ import annotations

import shlex
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dpo_fast.models.config import ModelPath
from dpo_fast.wording import quoted

EVERYWHERE = ("type", "samples", "max_failures")
ASKED = ("timeout_seconds", "max_retries", "concurrency")  # of judges outside this process
SCORED = ("batch_size", "dtype", "trust_remote_code")  # of models in this process
USES = {  # options of each judge, the first of which it needs
    "rule": ("function", "weights", "multi_objective_aggregation", "kwargs", *ASKED),
    "command": ("command", "keep_alive", "unit", *ASKED),
    "openai": (
        *("url", "model", "compare", "both_orders", "rubric", "system_prompt", "temperature"),
        *("max_tokens", "seed", "extra_body", "api_key_env", "cache", *ASKED),
    ),
    "reward_model": (*("path", "label", "input", "apply_chat_template", "max_length", *SCORED),),
    "implicit": ("reference", "beta", "per_token", *SCORED),
}


OF_GROUPS = {"strategy", "unfinished"}  # options of `pairs` that groups have, too


class JudgeSection(BaseModel):
    """What scores completions. Each judge has options of its own; those of others are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Literal["rule", "command", "openai", "reward_model", "implicit"] = Field(
        description="rule: a Python function; command: a program that answers lines of JSON; openai: a "
        "chat model behind an OpenAI-compatible server; reward_model: a sequence classifier of "
        "transformers; implicit: beta (log policy - log reference), the policy being model.path"
    )
    samples: str | None = Field(
        default=None, description="completions to judge; default: samples.jsonl of output_dir"
    )
    max_failures: int = Field(
        default=10,
        ge=1,
        description="failures in a row, such as crashes and time-outs, that end the command. What was "
        "judged is kept, and the same command goes on after it",
    )
    function: str | list[str] | None = Field(
        default=None,
        description="rule: module:function or path.py:function. It gets (prompt, completion) and columns "
        "of the row by name, and returns a number, true or false, or None to refuse. One with a parameter "
        "`completions` gets lists, as reward functions of TRL do. Of several the scores are added, and "
        "None adds nothing",
    )
    weights: list[float] | None = Field(
        default=None, description="rule, of several functions: a weight for each; default: all 1"
    )
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = Field(
        default="sum_then_normalize",
        description="rule, of several functions: normalize_then_sum gives the scores of each the same mean "
        "and spread over the completions of a prompt before they are added (GDPO)",
    )
    kwargs: dict[str, Any] = Field(
        default_factory=dict, description="rule: further arguments of the function"
    )
    command: str | list[str] | None = Field(
        default=None,
        description='command: a program and its arguments. It gets {"prompt", "completion", ...} as one '
        'line of JSON on standard input, and answers {"score": number or null} in one line',
    )
    keep_alive: bool = Field(
        default=True, description="command: one process for all lines; false: one for each line"
    )
    unit: Literal["completion", "row"] = Field(
        default="completion",
        description='command: what a line holds; row: a prompt with its `completions`, answered {"scores": '
        "[...]}",
    )
    url: str | None = Field(
        default=None, description="openai: address of the server, as in http://localhost:8000/v1"
    )
    model: str | None = Field(
        default=None, description="openai: the name of the model on the server"
    )
    compare: Literal["pointwise", "pairwise"] = Field(
        default="pointwise",
        description="openai: pointwise: a number for each completion; pairwise: every two completions of "
        "a prompt are compared, and a score is the share of comparisons won",
    )
    both_orders: bool = Field(
        default=True,
        description="openai, pairwise: compare in both orders. A judge that answers by the place counts "
        "as a tie",
    )
    rubric: str | None = Field(
        default=None,
        description="openai: what the judge is asked, or file:PATH, with {prompt} and {completion}, or "
        "{first} and {second}. Default: one that ends with [[7]] (1 to 10), or [[A]], [[B]] or [[C]], a "
        "tie. The last such mark of the answer counts",
    )
    system_prompt: str | None = Field(
        default=None, description="openai: the system message of the judge"
    )
    temperature: float | None = Field(
        default=0.0,
        ge=0,
        description="openai: of the judge's answers; null for models that refuse the field",
    )
    max_tokens: int | None = Field(
        default=1024,
        ge=1,
        description="openai: tokens of an answer, at most; null for models that refuse the field, with "
        "extra_body: {max_completion_tokens: 4096}",
    )
    seed: int | None = Field(default=None, description="openai: seed, for servers that take one")
    extra_body: dict[str, Any] = Field(
        default_factory=dict, description="openai: further fields of a request"
    )
    api_key_env: str = Field(
        default="OPENAI_API_KEY",
        description="openai: environment variable with the key; a server without keys needs none",
    )
    cache: bool = Field(
        default=True,
        description="openai: keep every answer in judge-cache.jsonl, and ask nothing twice",
    )
    path: ModelPath | None = Field(
        default=None, description="reward_model: a folder or hub id, also as org/name@revision"
    )
    label: int | str | None = Field(
        default=None,
        description="reward_model: of a classifier with several labels the one whose logit is the score, "
        "by name or number",
    )
    input: Literal["conversation", "completion"] = Field(
        default="conversation",
        description="reward_model: what it reads; completion: the answer alone, as classifiers of "
        "sentiment or toxicity do",
    )
    apply_chat_template: Literal["auto"] | bool = Field(
        default="auto",
        description="reward_model: for prompts that are text. true: a user's message, through its chat "
        "template; false: text as it stands; auto: the template where it has one",
    )
    max_length: int | None = Field(
        default=None,
        ge=2,
        description="reward_model: tokens of a text, of which the last stay. Default: as many as it takes",
    )
    reference: ModelPath | None = Field(
        default=None, description="implicit: the reference model, a folder or hub id"
    )
    beta: float = Field(default=0.1, gt=0, description="implicit: beta of the reward")
    per_token: bool = Field(
        default=False,
        description="implicit: divide by the completion's tokens, as length-normalised DPO does",
    )
    batch_size: int = Field(
        default=8, ge=1, description="reward_model, implicit: texts of a forward pass"
    )
    dtype: Literal["auto", "bf16", "fp32"] = Field(
        default="auto", description="reward_model, implicit: dtype of weights, as model.dtype"
    )
    trust_remote_code: bool = Field(
        default=False, description="reward_model, implicit: run code that comes with the model"
    )
    timeout_seconds: float = Field(
        default=60.0, gt=0, description="rule, command, openai: seconds that an answer may take"
    )
    max_retries: int = Field(
        default=2,
        ge=0,
        description="rule, command, openai: further tries after a crash or a time-out",
    )
    concurrency: int | None = Field(
        default=None,
        ge=1,
        description="rule, command, openai: processes, or requests at a time. Default: 1, openai 8",
    )

    @model_validator(mode="after")
    def _check(self) -> JudgeSection:
        used = USES[self.type]
        given = self.model_fields_set - set(EVERYWHERE)
        if extra := sorted(given - set(used)):
            name = extra[0]
            owners = " and ".join(kind for kind, names in USES.items() if name in names)
            raise ValueError(
                f"judge.{name}={quoted(getattr(self, name))} is an option of judge.type={owners}, and is "
                f"not used by judge.type={self.type}; remove it"
            )
        needed = used[:2] if self.type == "openai" else used[:1]
        for name in needed:
            if not getattr(self, name):
                raise ValueError(f"judge.type={self.type} needs judge.{name}")
        if self.type == "openai" and not self.url.startswith(("http://", "https://")):
            raise ValueError(
                f"judge.url={self.url}: expected the address of a server, such as http://localhost:8000/v1"
            )
        for name in self.functions:
            if not all(name.rpartition(":")[::2]):
                raise ValueError(
                    f"judge.function={name}: expected module:function or path.py:function"
                )
        for name in sorted({"weights", "multi_objective_aggregation"} & given):
            if len(self.functions) < 2:
                raise ValueError(
                    f"judge.{name}={quoted(getattr(self, name))} is for several functions; remove it"
                )
        if self.weights is not None and len(self.weights) != len(self.functions):
            raise ValueError(
                f"judge.weights={self.weights}: {len(self.functions)} functions need as many weights"
            )
        if self.type == "command" and not self.arguments:
            raise ValueError("judge.command is empty; name a program")
        if self.compare == "pointwise" and "both_orders" in self.model_fields_set:
            raise ValueError(
                "judge.both_orders is used with judge.compare=pairwise alone; remove it"
            )
        return self

    @property
    def functions(self) -> list[str]:
        """`function` as a list; empty for other judges."""
        if self.function is None:
            return []
        return [self.function] if isinstance(self.function, str) else self.function

    @property
    def arguments(self) -> list[str]:
        """`command` as a list of words."""
        if isinstance(self.command, list):
            return self.command
        try:
            return shlex.split(self.command or "")
        except ValueError as error:
            raise ValueError(f"judge.command={self.command}: {error}") from None

    @property
    def parallel(self) -> int:
        """`concurrency`, or its default."""
        return self.concurrency or (8 if self.type == "openai" else 1)


class PairsSection(BaseModel):
    """Which pairs are made of scored completions. Completions with equal scores are never a pair."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    strategy: Literal["best_worst", "all", "best_random", "groups"] = Field(
        default="best_worst",
        description="best_worst: the best against the worst; all: every two whose scores differ by more "
        "than margin (DNO-Prct, arXiv 2404.03715); best_random: the best against one of the others, drawn "
        "by seed; groups: no pairs, but all scored completions of a prompt, for losses on groups",
    )
    margin: float = Field(
        default=0.0,
        ge=0,
        allow_inf_nan=False,
        description="a pair's scores differ by more than this",
    )
    max_per_prompt: int | None = Field(
        default=None,
        ge=1,
        description="pairs of a prompt, those of the largest differences first; default: all",
    )
    seed: int = Field(default=0, ge=0, description="seed of best_random")
    unfinished: Literal["reject", "drop", "keep"] = Field(
        default="reject",
        description="completions that max_new_tokens cut off. reject: they may be rejected, and are never "
        "chosen; drop: they are left out; keep: as all others",
    )
    max_length_ratio: float | None = Field(
        default=None,
        ge=1,
        allow_inf_nan=False,
        description="drop pairs whose longer answer has more than so many times the characters of the "
        "shorter",
    )
    only_length: Literal["drop", "keep"] = Field(
        default="drop",
        description="pairs that differ in length alone: the words of one answer are the first words of "
        "the other",
    )
    soft_label: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="write the column soft_label, sigmoid(this x difference of scores), for losses that "
        "take one; default: none",
    )
    margin_column: bool = Field(
        default=False,
        description="write the column margin, the difference of scores, for losses that take one",
    )

    @model_validator(mode="after")
    def _check(self) -> PairsSection:
        if "seed" in self.model_fields_set and self.strategy != "best_random":
            raise ValueError(
                f"pairs.seed={self.seed} is used by pairs.strategy=best_random alone; remove it"
            )
        if self.strategy == "groups" and (extra := sorted(self.model_fields_set - OF_GROUPS)):
            raise ValueError(
                f"pairs.{extra[0]}={getattr(self, extra[0])} is of pairs, and pairs.strategy=groups makes "
                "none; remove it"
            )
        if self.max_per_prompt is not None and self.strategy != "all":
            raise ValueError(
                f"pairs.max_per_prompt={self.max_per_prompt}, but pairs.strategy={self.strategy} makes one "
                "pair of a prompt; set pairs.strategy=all, or remove it"
            )
        return self
