"""The options of the data section."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from dpo_fast.data.entries import (
    READING,
    Entries,
    Format,
    SourceOptions,
    check_entries,
    path_of,
    read_entries,
)
from dpo_fast.data.forms.table import COLUMNS as FORM_COLUMNS
from dpo_fast.data.forms.table import NAMES as FORMS
from dpo_fast.data.kinds import KINDS
from dpo_fast.data.verdicts import DEFAULT_ROW_BYTES

CHAT_COLUMNS = ("tools", "chat_template_kwargs")
IMAGES = "images"
# Arguments of apply_chat_template that are not the user's to set.
TEMPLATE_ARGUMENTS = (
    *("messages", "conversation", "chat_template", "tools", "documents", "tokenize"),
    *("add_generation_prompt", "continue_final_message", "return_dict", "return_tensors"),
    *("padding", "truncation", "max_length", "return_assistant_tokens_mask", "tokenizer_kwargs"),
)
LARGEST_DEFAULT = 1 << 30  # bytes of a row, however long max_length is
MOST_WORKERS = 1024
COLUMNS = (
    "prompt",
    *dict.fromkeys(answer for kind in KINDS for answer in kind.answers),
    *(column for kind in KINDS for column in kind.label_columns),
    *dict.fromkeys(number for kind in KINDS for number in kind.numbers),
    *CHAT_COLUMNS,
    IMAGES,
)
ALL_COLUMNS = (*COLUMNS, *(name for name in FORM_COLUMNS if name not in COLUMNS))
# Names of options elsewhere, as keys of data.columns.
OPTIONS_ELSEWHERE = {
    "input_key": "prompt",
    "prompt_key": "prompt",
    "chosen_key": "chosen",
    "rejected_key": "rejected",
    "output_key": "completion",
    "label_key": "label",
}


class DataConfig(BaseModel):
    """Which rows to read, and how to turn them into tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    train: str | list[str | SourceOptions] = Field(
        description="a file, a glob, a folder, or a hub id (org/name@revision); both also as name:split, "
        "and of a hub data set with several configurations as name:config/split; or several. A source of "
        "several may be a mapping with the keys below"
    )
    stopping_strategy: Literal["first_exhausted", "all_exhausted"] = Field(
        default="first_exhausted",
        description="what an epoch of sources with weights is, as in `datasets.interleave_datasets`. "
        "first_exhausted: as many examples as there are without one coming twice; all_exhausted: as "
        "many as it takes until every example has come, with smaller sources shuffled and repeated",
        json_schema_extra={"refused": "without weights; with streaming"},
    )
    eval: str | list[str | SourceOptions] | None = Field(
        default=None,
        description="the same, for evaluation",
        json_schema_extra={"refused": "names that are also in train; beside eval_rows"},
    )
    eval_rows: int = Field(
        default=0,
        description="rows of train that are held out for evaluation, of sources with weights in "
        "proportion to them; 0: none",
        json_schema_extra={"refused": "beside eval; with streaming"},
    )
    seed: int = Field(default=0, description="seed of the shuffle whose last rows are held out")
    format: Format = Field(
        default="auto",
        description="pairs: two answers, as text; messages: answers are lists of messages; unpaired: one "
        "completion and a label, true if it is desirable; groups: lists of completions and of scores, or "
        "of ranks, of which 1 is the best; sft: one answer to learn, without a label, of pairs the chosen "
        "one, of groups the best, of completions the desirable ones; auto: what the columns and their "
        "values tell. Forms of other trainers and data sets (docs/FORMATS.md): openrlhf, "
        f"{', '.join(FORMS)}",
    )
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="our column name, or a form's (docs/FORMATS.md), to yours, as in `chosen: better`",
        json_schema_extra={"refused": "a name that is not ours, or that rows of this kind lack"},
    )
    ignore_columns: list[str] = Field(
        default_factory=list,
        description="columns that are passed over as if they were not there. A column of words that "
        "nothing uses is an error unless it is named here",
        json_schema_extra={"refused": "columns that data.columns names"},
    )
    group_pairs: Literal["best_worst"] | None = Field(
        default=None,
        description="best_worst: make a pair of the best and the worst answer of every group, for losses "
        "on pairs; ties are dropped. Rows that are pairs stay so",
        json_schema_extra={"refused": "with format unpaired and sft"},
    )
    prompt_end: str | None = Field(
        default=None,
        description="for texts without a prompt column: the marker whose last occurrence ends the "
        "prompt; not needed for dialogues with Human: and Assistant: turns",
    )
    max_length: int = Field(
        default=1024, description="tokens of prompt and completion together, at most"
    )
    max_prompt_length: int | None = Field(
        default=None,
        description="tokens that a prompt may keep however long the completions are; default: half of "
        "max_length",
        json_schema_extra={"refused": "unless below max_length"},
    )
    truncation: Literal["keep_end", "keep_start", "drop", "error"] = Field(
        default="keep_end",
        description="for a row that is too long: keep_end and keep_start keep that part of the prompt; "
        "drop leaves the row out; error stops",
    )
    on_bad_row: Literal["error", "skip"] = Field(
        default="error", description="error: stop at a bad row; skip: leave it out and report it"
    )
    max_row_bytes: int | None = Field(
        default=None,
        ge=1,
        description="bytes of a row, at most: of its line, or of its texts where the file is Parquet or "
        "Arrow, or has images in data URIs. A larger one is a bad row, told before it is decoded and "
        "tokenised, which takes some 300 bytes of memory and 3 microseconds for each byte. Default: 64 for "
        "each token of max_length, at least 1 MiB",
    )
    add_eos: bool = Field(
        default=True, description="add EOS to completions that have no end of turn"
    )
    scored: Literal["assistant", "last", "all"] = Field(
        default="assistant",
        description="what of an answer of several messages is scored: what the assistant wrote, each turn "
        "with its end; only its last turn; or all, messages of users and tools too. An assistant message "
        "with `weight: 0` is never scored",
        json_schema_extra={"refused": "last where all rows are text"},
    )
    apply_chat_template: Literal["auto"] | bool = Field(
        default="auto",
        description="for rows of text. true: the prompt is a user's message and the answers are the "
        "assistant's, through the chat template; false: they are text as they stand; auto: the same, and "
        "said where the tokenizer has a chat template",
    )
    chat_template: str | None = Field(
        default=None,
        description="a Jinja file in place of the tokenizer's chat template; it is exported with the model",
    )
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict,
        description="arguments of the chat template for all rows, as in `enable_thinking: false`. A row's "
        "own chat_template_kwargs come first",
        json_schema_extra={
            "refused": "names that the template does not use; where all rows are text"
        },
    )
    image_folder: str | None = Field(
        default=None,
        description="where relative paths of images begin; default: the folder of the data file, then the "
        "working directory",
    )
    images_kwargs: dict[str, Any] = Field(
        default_factory=dict,
        description="arguments of the model's image processor, such as min_pixels and max_pixels; default: "
        "as the model has them",
        json_schema_extra={"refused": "names that the processor does not take"},
    )
    max_rows: int | None = Field(
        default=None,
        description="rows that are read of train, and of eval; default: all",
        json_schema_extra={"refused": "where a source is a mapping"},
    )
    workers: int = Field(
        default=1,
        description="processes that tokenise",
        json_schema_extra={"refused": "above 1 with streaming and without eval"},
    )
    streaming: bool = Field(
        default=False,
        description="read, check and tokenise train while training on it, and store nothing. The data "
        "begins again at its end",
        json_schema_extra={
            "refused": "without train.max_steps; with a stored reference; with grpo and dapo"
        },
    )
    stream_buffer: int = Field(
        default=10_000,
        description="rows of a stream that are held at a time and shuffled. Each such chunk ends with a "
        "smaller step unless train.global_batch_size divides it",
        json_schema_extra={"refused": "without streaming; below train.global_batch_size"},
    )
    cache_dir: str | None = Field(
        default=None,
        description="folder of tokenised rows; default: beside the cache of `datasets`",
    )

    @field_validator("train", "eval", mode="before")
    @classmethod
    def _read_entries(cls, value: Any, info: ValidationInfo) -> Any:
        return read_entries(f"data.{info.field_name}", value)

    @property
    def train_entries(self) -> Entries:
        """What stands in `train`, always as a list."""
        return _listed(self.train)

    @property
    def eval_entries(self) -> Entries:
        """What stands in `eval`; empty when it is not set."""
        return [] if self.eval is None else _listed(self.eval)

    @property
    def weights(self) -> list[float]:
        """The weights of the sources of `train`; empty if they have none."""
        given = (entry for entry in self.train_entries if isinstance(entry, SourceOptions))
        return [entry.weight for entry in given if entry.weight is not None]

    @property
    def formats(self) -> set[str]:
        """The formats of the sources of `train`."""
        own = (e.format for e in self.train_entries if isinstance(e, SourceOptions))
        plain = any(isinstance(entry, str) for entry in self.train_entries)
        return {each or self.format for each in own} | ({self.format} if plain else set())

    @property
    def only_single(self) -> bool:
        """Whether the formats tell that every example is one sequence."""
        return self.formats <= {"unpaired", "sft"}

    def for_evaluation(self) -> DataConfig:
        """What stands in `train`, to be evaluated on and not trained on."""
        return self.model_copy(update={"eval": self.train})

    @property
    def evaluates_alone(self) -> bool:
        """Whether this is of `for_evaluation`: nobody else may name the same twice."""
        return self.eval == self.train

    @property
    def has_eval(self) -> bool:
        """Whether there is evaluation data."""
        return self.eval is not None or self.eval_rows > 0

    @property
    def row_bytes(self) -> int:
        """Bytes of a row, at most: max_row_bytes, or its default."""
        default = min(max(64 * self.max_length, DEFAULT_ROW_BYTES), LARGEST_DEFAULT)
        return self.max_row_bytes or default

    @property
    def prompt_reserve(self) -> int:
        """Tokens a prompt may always keep: max_prompt_length, or half of max_length."""
        return self.max_prompt_length or self.max_length // 2

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        _check_sources(self)
        _check_sizes(self)
        _check_columns(self)
        _check_template_arguments(self)
        _check_stream(self)
        return self


def _listed(value: str | list) -> Entries:
    return [value] if isinstance(value, str) else list(value)


def _check_sources(config: DataConfig) -> None:
    sections = {name: getattr(config, name) for name in READING}
    for option, entries in (("train", config.train_entries), ("eval", config.eval_entries)):
        given = getattr(config, option)
        if given is not None and (not entries or not all(path_of(e).strip() for e in entries)):
            raise ValueError(
                f"data.{option}={given!r} names no data; name a file, folder or hub id"
            )
        check_entries(f"data.{option}", entries, sections)
    shared = set(map(path_of, config.train_entries)) & set(map(path_of, config.eval_entries))
    if shared:
        raise ValueError(
            f"data.eval={min(shared)!r} is also in data.train; evaluation on training data means "
            "nothing. Name other data, or leave data.eval out and set data.eval_rows"
        )
    if config.stopping_strategy != "first_exhausted" and not config.weights:
        raise ValueError(
            f"data.stopping_strategy={config.stopping_strategy} is not used: no source of data.train has "
            "a weight; remove it, or give every source one"
        )
    if config.eval is not None and config.eval_rows:
        raise ValueError(
            f"data.eval_rows={config.eval_rows} holds examples out of data.train, but data.eval="
            f"{config.eval!r} is set as well; leave one of them out"
        )
    if config.prompt_end is not None and not config.prompt_end.strip():
        raise ValueError(f"data.prompt_end={config.prompt_end!r} is blank; give the marker's text")


def _check_sizes(config: DataConfig) -> None:
    entries = [*config.train_entries, *config.eval_entries]
    if config.max_rows is not None and any(isinstance(each, SourceOptions) for each in entries):
        raise ValueError(
            f"data.max_rows={config.max_rows} does not say which source it cuts; remove it, and set rows "
            "in the sources"
        )
    least = {"max_length": 2, "max_prompt_length": 1, "eval_rows": 0, "max_rows": 1, "workers": 1}
    least |= {"stream_buffer": 1, "seed": 0}
    for option, minimum in least.items():
        value = getattr(config, option)
        if value is not None and value < minimum:
            raise ValueError(f"data.{option}={value} must be at least {minimum}")
    if config.workers > MOST_WORKERS:
        raise ValueError(
            f"data.workers={config.workers} is more than {MOST_WORKERS}; set it to the number of cores"
        )
    if config.max_prompt_length is not None and config.max_prompt_length >= config.max_length:
        raise ValueError(
            f"data.max_prompt_length={config.max_prompt_length} leaves no room for a completion "
            f"within data.max_length={config.max_length}; try {config.max_length // 2}"
        )


def _check_columns(config: DataConfig) -> None:
    entries = {"data": config}
    for option, listed in (("train", config.train_entries), ("eval", config.eval_entries)):
        own = (each for each in enumerate(listed) if isinstance(each[1], SourceOptions))
        entries |= {f"data.{option}[{index}]": entry for index, entry in own}
    for place, entry in entries.items():
        columns = entry.columns or {}
        for ours, theirs in columns.items():
            if ours in OPTIONS_ELSEWHERE:
                raise ValueError(
                    f"{place}.columns.{ours}={theirs!r}: this column is called "
                    f"{OPTIONS_ELSEWHERE[ours]!r} here"
                )
            if ours not in ALL_COLUMNS:
                raise ValueError(
                    f"{place}.columns.{ours}={theirs!r}: there is no column {ours!r}; the keys are ours "
                    f"({', '.join(ALL_COLUMNS)}) and the values yours"
                )
        both = sorted(set(entry.ignore_columns or ()) & set(columns.values()))
        if both:
            raise ValueError(
                f"{place}.ignore_columns={both} passes over a column that {place}.columns names; leave it "
                "out of one"
            )
    if config.group_pairs and config.format in ("unpaired", "sft"):
        raise ValueError(
            f"data.group_pairs={config.group_pairs} makes pairs, and data.format={config.format} is for "
            "single completions; remove one of them"
        )


def _check_template_arguments(config: DataConfig) -> None:
    for name, value in config.chat_template_kwargs.items():
        if name in TEMPLATE_ARGUMENTS:
            raise ValueError(
                f"data.chat_template_kwargs.{name}={value!r} is set by dpo_fast itself; remove it"
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
    if config.stopping_strategy != "first_exhausted":
        raise ValueError(
            f"data.stopping_strategy={config.stopping_strategy} is not used with data.streaming=true: a "
            "stream has no end, and each source begins again at its own; remove it"
        )
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
