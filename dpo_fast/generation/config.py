"""The section `sample`: which prompts are completed, how often and how."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class SampleSection(BaseModel):
    """Completions that are sampled for each prompt."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompts: str | list[str] = Field(
        description="files, folders or hub ids of rows with a prompt, as in data.train; of pairs the prompt "
        "is taken"
    )
    num_generations: int = Field(4, ge=1, description="completions of each prompt")
    temperature: float = Field(1.0, ge=0, description="0: the likeliest token, always")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus sampling")
    max_new_tokens: int = Field(256, ge=1, description="tokens of a completion, at most")
    stop: list[str] = Field(default_factory=list, description="texts that end a completion")
    seed: int = Field(0, ge=0, description="the same seed gives the same completions")
    system_prompt: str | None = Field(
        None, description="the system message of prompts that have none"
    )
