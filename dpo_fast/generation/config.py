"""The section `sample`: which prompts are completed, how often and how, and by what."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

LEAST_TEMPERATURE = 0.01
FORBID = ConfigDict(extra="forbid", frozen=True)
# Which type of engine an option is of.
OPTIONS = {
    "batch_size": ("transformers", "vllm"),
    "url": ("openai",),
    "model": ("openai",),
    "api": ("openai",),
    "send": ("openai",),
    "api_key_env": ("openai",),
    "concurrency": ("openai",),
    "timeout_seconds": ("openai",),
    "max_retries": ("openai",),
    "extra_body": ("openai",),
    "options": ("vllm",),
}


def _only(option: str) -> dict[str, Any]:
    return {"refused": f"unless type is {' or '.join(OPTIONS[option])}"}


class EngineSection(BaseModel):
    """What writes the completions."""

    model_config = FORBID

    type: Literal["transformers", "vllm", "openai"] = Field(
        default="transformers",
        description="transformers: its `generate`, on any machine, a whole copy of the model on every "
        "rank; vllm: in this process, where vLLM is installed; openai: a running server with the "
        "OpenAI API, such as vLLM's",
    )
    batch_size: int | None = Field(
        default=None,
        ge=1,
        description="completions that are written at a time; default: 32, of vllm 1024. Another size "
        "gives other completions",
        json_schema_extra=_only("batch_size"),
    )
    url: str | None = Field(
        default=None,
        description="base URL of the server, as in http://localhost:8000/v1",
        json_schema_extra=_only("url"),
    )
    model: str | None = Field(
        default=None,
        description="name under which the server has the model; default: model.path",
        json_schema_extra=_only("model"),
    )
    api: Literal["completions", "chat"] = Field(
        default="completions",
        description="completions: the prompt's token ids, as in training, are sent to /completions; chat: "
        "messages are sent to /chat/completions, and the server has the chat template",
        json_schema_extra=_only("api"),
    )
    send: Literal["ids", "text"] = Field(
        default="ids",
        description="with api=completions. ids: the prompt as token ids, which vLLM, SGLang and OpenAI "
        "take; text: as text, to a server that takes no ids; its tokenizer puts BOS before it",
        json_schema_extra={"refused": "text with api=chat"},
    )
    api_key_env: str = Field(
        default="OPENAI_API_KEY",
        description="environment variable with the key of the server; without it none is sent",
        json_schema_extra=_only("api_key_env"),
    )
    concurrency: int = Field(
        default=32,
        ge=1,
        le=4096,
        description="requests that wait at the server at a time, on each rank",
        json_schema_extra=_only("concurrency"),
    )
    timeout_seconds: float = Field(
        default=600.0,
        gt=0,
        description="a request that takes longer is tried again",
        json_schema_extra=_only("timeout_seconds"),
    )
    max_retries: int = Field(
        default=5,
        ge=0,
        le=100,
        description="times that a request is tried again, later each time",
        json_schema_extra=_only("max_retries"),
    )
    extra_body: dict[str, Any] = Field(
        default_factory=dict,
        description="more fields of every request, for a server that knows them",
        json_schema_extra=_only("extra_body"),
    )
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="arguments of vllm.LLM, such as tensor_parallel_size and gpu_memory_utilization",
        json_schema_extra=_only("options"),
    )

    @model_validator(mode="after")
    def _check(self) -> EngineSection:
        for option, types in OPTIONS.items():
            if option in self.model_fields_set and self.type not in types:
                raise ValueError(
                    f"sample.engine.{option} is not used by sample.engine.type={self.type}; remove it, or "
                    f"set type={' or '.join(types)}"
                )
        if self.send == "text" and self.api == "chat":
            raise ValueError(
                "sample.engine.send=text is not used by sample.engine.api=chat, which sends messages; "
                "remove it"
            )
        if self.type == "openai" and not (self.url or "").startswith(("http://", "https://")):
            raise ValueError(
                f"sample.engine.url={self.url}: sample.engine.type=openai needs the address of a server, "
                "as in http://localhost:8000/v1"
            )
        return self

    @property
    def sequences(self) -> int:
        """Completions of a batch."""
        return self.batch_size or {"transformers": 32, "vllm": 1024, "openai": 1}[self.type]


class SampleSection(BaseModel):
    """Completions that are sampled for each prompt."""

    model_config = FORBID

    prompts: str | list[str] | None = Field(
        default=None,
        description="files, folders or hub ids of rows with a prompt, as in data.train: texts, messages or "
        "a question; of pairs, groups and examples of SFT the prompt is taken. Stages of `iterate` "
        "have their own",
    )
    num_generations: int = Field(default=4, ge=1, le=4096, description="completions of each prompt")
    temperature: float = Field(
        default=1.0, ge=0, le=100, description="0: the likeliest token, always"
    )
    top_p: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="nucleus sampling: the likeliest tokens of so much together",
    )
    top_k: int = Field(default=0, ge=0, description="only the so many likeliest tokens; 0: all")
    min_p: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="only tokens with this share of the likeliest one's probability",
    )
    repetition_penalty: float = Field(
        default=1.0, gt=0, le=100, description="above 1, tokens that were there become less likely"
    )
    max_new_tokens: int = Field(default=256, ge=1, description="tokens of a completion, at most")
    stop: list[str] = Field(
        default_factory=list,
        description="texts that end a completion, and are no part of it",
        json_schema_extra={"refused": "empty ones"},
    )
    seed: int = Field(
        default=0,
        ge=0,
        lt=2**32,
        description="the same seed gives the same completions, on any number of ranks",
    )
    system_prompt: str | None = Field(
        default=None,
        description="the system message of chats that have none",
        json_schema_extra={"refused": "where all prompts are text"},
    )
    max_prompts: int | None = Field(
        default=None,
        ge=1,
        description="the first so many prompts of a seeded shuffle; default: all",
    )
    long_prompts: Literal["drop", "error"] = Field(
        default="drop",
        description="for prompts that leave no room for max_new_tokens within data.max_length, or within "
        "the model's positions: drop counts them, error stops",
    )
    logps: bool | None = Field(
        default=None,
        description="score the completions once with the model, which a run then need not do for its "
        "reference; default: true, except with engine.type=openai, whose model need not fit here",
    )
    output: Literal["jsonl", "parquet"] = Field(
        default="jsonl", description="kind of the file of rows"
    )
    engine: EngineSection = Field(
        default_factory=EngineSection, description="what writes the completions"
    )

    @property
    def scores(self) -> bool:
        """Whether the completions are scored."""
        return self.engine.type != "openai" if self.logps is None else self.logps

    @model_validator(mode="after")
    def _check(self) -> SampleSection:
        if 0 < self.temperature < LEAST_TEMPERATURE:
            raise ValueError(
                f"sample.temperature={self.temperature:g} is below {LEAST_TEMPERATURE}, where numbers "
                "overflow; set it to 0 for the likeliest token, with num_generations=1"
            )
        names = [self.prompts] if isinstance(self.prompts, str) else self.prompts
        if names is not None and not (names and all(name.strip() for name in names)):
            raise ValueError(
                f"sample.prompts={self.prompts!r} names no data; name a file, folder or hub id"
            )
        if self.temperature == 0 and self.num_generations > 1:
            raise ValueError(
                f"sample.temperature=0 writes the same completion sample.num_generations="
                f"{self.num_generations} times; set num_generations=1, or a temperature above 0"
            )
        for option in ("top_p", "top_k", "min_p"):
            if (
                self.temperature == 0
                and getattr(self, option) != type(self).model_fields[option].default
            ):
                raise ValueError(
                    f"sample.{option}={getattr(self, option)} is not used with sample.temperature=0, which "
                    "draws nothing; remove it"
                )
        if not all(self.stop):
            raise ValueError(
                "sample.stop has an empty text, which would end every completion; remove it"
            )
        if self.system_prompt is not None and not self.system_prompt.strip():
            raise ValueError(
                f"sample.system_prompt={self.system_prompt!r} is blank; remove it, or give the text"
            )
        return self
