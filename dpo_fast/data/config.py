"""The options of the data section."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dpo_fast.data.kinds import KINDS

CHAT_COLUMNS = ("tools", "chat_template_kwargs")
COLUMNS = (
    "prompt",
    *(answer for kind in KINDS for answer in kind.answers),
    *(column for kind in KINDS for column in kind.label_columns),
    *dict.fromkeys(number for kind in KINDS for number in kind.numbers),
    *CHAT_COLUMNS,
)


class DataConfig(BaseModel):
    """Which rows to read, and how to turn them into tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    train: str | list[str] = Field(
        description="A file, a glob, a folder, or a hub id as `name` or `name:split`; or several, "
        "read one after the other."
    )
    eval: str | list[str] | None = Field(None, description="The same, for evaluation.")
    eval_rows: int = Field(
        0, description="Examples held out of `train` when `eval` is not set; 0: no evaluation."
    )
    seed: int = Field(0, description="Seed of the shuffle whose end is held out for evaluation.")
    format: Literal["auto", "pairs", "messages", "unpaired", "groups"] = Field(
        "auto",
        description="`pairs`: answers are text; `messages`: answers are message lists; `unpaired`: "
        "single completions, text or messages, with a label that is true for desirable ones; `groups`: "
        "lists of completions with scores, or with ranks, 1 for the best; `auto`: the columns and "
        "their values tell.",
    )
    columns: dict[str, str] = Field(
        default_factory=dict, description="Our column name to yours, as in `chosen: good`."
    )
    prompt_end: str | None = Field(
        None,
        description="For texts without a prompt column: the marker whose last occurrence ends the "
        "prompt. Not needed for dialogues with Human: and Assistant: turns.",
    )
    max_length: int = Field(1024, description="Tokens kept of prompt + completion, at most.")
    max_prompt_length: int | None = Field(
        None,
        description="Tokens a prompt may always keep, however long the completions are; half of "
        "`max_length` when not set.",
    )
    truncation: Literal["keep_end", "keep_start", "drop", "error"] = Field(
        "keep_end",
        description="What to do with a row that is too long: keep the prompt's end or its start, "
        "drop the row, or stop.",
    )
    on_bad_row: Literal["error", "skip"] = Field(
        "error", description="Stop at a bad row, or skip and report it."
    )
    add_eos: bool = Field(True, description="End each completion that has no end of turn with EOS.")
    chat_template: str | None = Field(
        None, description="Path of a Jinja file used in place of the tokenizer's chat template."
    )
    max_rows: int | None = Field(None, description="Rows read from each of train and eval.")
    workers: int = Field(1, description="Processes that tokenise.")
    streaming: bool = Field(
        False,
        description="Read, check and tokenise `train` while training on it; nothing is stored. Needs "
        "train.max_steps: at its end the data begins again.",
    )
    stream_buffer: int = Field(
        10_000,
        description="Examples of a stream that are held, shuffled and trained on at a time; each such "
        "chunk ends with a smaller step unless train.global_batch_size divides it.",
    )
    cache_dir: str | None = Field(
        None, description="Where tokenised data is kept; beside the cache of `datasets` if unset."
    )

    @property
    def train_sources(self) -> list[str]:
        """The names in `train`, always as a list."""
        return _names(self.train)

    @property
    def eval_sources(self) -> list[str]:
        """The names in `eval`; empty when it is not set."""
        return [] if self.eval is None else _names(self.eval)

    @property
    def has_eval(self) -> bool:
        """Whether there is evaluation data."""
        return self.eval is not None or self.eval_rows > 0

    @property
    def prompt_reserve(self) -> int:
        """Tokens a prompt may always keep: max_prompt_length, or half of max_length."""
        return self.max_prompt_length or self.max_length // 2

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        _check_sources(self)
        _check_sizes(self)
        _check_columns(self)
        _check_stream(self)
        return self


def _names(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def _check_sources(config: DataConfig) -> None:
    for option, names in (("train", config.train_sources), ("eval", config.eval_sources)):
        given = getattr(config, option)
        if given is not None and (not names or not all(name.strip() for name in names)):
            raise ValueError(
                f"data.{option}={given!r} names no data; name a file, folder or hub id"
            )
    shared = sorted(set(config.train_sources) & set(config.eval_sources))
    if shared:
        raise ValueError(
            f"data.eval={shared[0]!r} is also in data.train; evaluation on training data means "
            "nothing. Name other data, or leave data.eval out and set data.eval_rows"
        )
    if config.eval is not None and config.eval_rows:
        raise ValueError(
            f"data.eval_rows={config.eval_rows} holds examples out of data.train, but data.eval="
            f"{config.eval!r} is set as well; leave one of them out"
        )
    if config.prompt_end is not None and not config.prompt_end.strip():
        raise ValueError(f"data.prompt_end={config.prompt_end!r} is blank; give the marker's text")


def _check_sizes(config: DataConfig) -> None:
    least = {"max_length": 2, "max_prompt_length": 1, "eval_rows": 0, "max_rows": 1, "workers": 1}
    least |= {"stream_buffer": 1, "seed": 0}
    for option, minimum in least.items():
        value = getattr(config, option)
        if value is not None and value < minimum:
            raise ValueError(f"data.{option}={value} must be at least {minimum}")
    if config.max_prompt_length is not None and config.max_prompt_length >= config.max_length:
        raise ValueError(
            f"data.max_prompt_length={config.max_prompt_length} leaves no room for a completion "
            f"within data.max_length={config.max_length}; try {config.max_length // 2}"
        )


def _check_columns(config: DataConfig) -> None:
    for ours, theirs in config.columns.items():
        if ours not in COLUMNS:
            raise ValueError(
                f"data.columns.{ours}={theirs!r}: there is no column {ours!r}; the keys are ours "
                f"({', '.join(COLUMNS)}) and the values yours"
            )


def _check_stream(config: DataConfig) -> None:
    if not config.streaming:
        default = type(config).model_fields["stream_buffer"].default
        if config.stream_buffer != default:
            raise ValueError(
                f"data.stream_buffer={config.stream_buffer} is not used; remove it, or set "
                "data.streaming=true"
            )
        return
    if config.eval_rows:
        raise ValueError(
            f"data.eval_rows={config.eval_rows} cannot be held out of a stream "
            "(data.streaming=true); name the evaluation data with data.eval"
        )
    if config.workers > 1 and config.eval is None:
        raise ValueError(
            f"data.workers={config.workers} is not used with data.streaming=true: a thread of each "
            "rank tokenises the stream; remove it"
        )
