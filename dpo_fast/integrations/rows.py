"""Rows of texts or messages to rows of token ids, for `PreferenceTrainer`, by the rules of `data/`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from pydantic import ValidationError

from dpo_fast.data.build import values
from dpo_fast.data.config import IMAGES, DataConfig
from dpo_fast.data.kinds import PAIRS
from dpo_fast.data.rows import parse_row
from dpo_fast.data.tokenise import RowTokeniser
from dpo_fast.data.verdicts import BadRow, Dropped
from dpo_fast.errors import UserError
from dpo_fast.progress import shown

logger = logging.getLogger("dpo_fast")
# Options of the section `data` that concern how a row is read and tokenised.
OPTIONS = (
    *("format", "columns", "ignore_columns", "prompt_end", "max_length", "max_prompt_length"),
    *("truncation", "apply_chat_template", "chat_template", "chat_template_kwargs", "add_eos"),
    *("on_bad_row", "scored"),
)
WANTED = (
    "This trainer takes rows with prompt, chosen and rejected, as text or as lists of messages, the "
    "other forms of pairs in docs/FORMATS.md, or token ids: prompt_ids, chosen_ids, rejected_ids"
)
LOOKED_AT = 8  # rows of token ids, for answers that have their prompt in them
# What rows of token ids are called elsewhere, and what they are here.
ELSEWHERE = {f"{name}_input_ids": f"{name}_ids" for name in ("prompt", "chosen", "rejected")}


class TokenRows(Sequence):
    """Rows of token ids, kept as arrays: a tenth of what lists of Python's numbers take."""

    def __init__(self) -> None:
        self._rows: list[dict[str, Any]] = []

    def add(self, row: Mapping[str, Any]) -> None:
        self._rows.append(
            {k: np.asarray(v, _dtype(k)) if isinstance(v, list) else v for k, v in row.items()}
        )

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self._rows[index]
        return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in row.items()}


def _dtype(name: str) -> type:
    return np.bool_ if name in PAIRS.scored else np.int32


def token_rows(dataset, name: str, tokenizer, options: Mapping[str, Any] | None, eos_ids):
    """The data set itself where its rows are token ids; else its rows tokenised.

    name: of the argument, for errors. tokenizer: None if there is none.
    options: of the section `data` (docs/CONFIG.md), for rows that are tokenised.
    eos_ids: at which the model stops generating.

    Raises:
        UserError: rows that no pair can be made of, with the columns that they have.
    """
    dataset = _rows(dataset)
    first = _first(dataset, name)
    if all(first.get(column) is not None for column in PAIRS.ids):
        if options:
            raise UserError(
                f"data_options={dict(options)} say how rows are tokenised, and those of {name} are token "
                "ids; leave it out"
            )
        _check_answers(dataset, name)
        return dataset
    _check_ids(first, name)
    if tokenizer is None:
        raise UserError(
            f"{name} has the columns {_names(first)}, and there is no tokenizer: pass "
            f"processing_class=tokenizer. {WANTED}"
        )
    if isinstance(tokenizer, str):
        raise UserError(
            f"processing_class={tokenizer!r}: expected a tokenizer, "
            f"AutoTokenizer.from_pretrained({tokenizer!r})"
        )
    config = _config(options or {})
    tokeniser = RowTokeniser(getattr(tokenizer, "tokenizer", tokenizer), config, eos_ids)
    rows, left_out = TokenRows(), {}
    with shown(f"tokenising {name}", len(dataset)) as advance:
        for index in range(len(dataset)):
            advance(1)
            try:
                rows.add(_tokenised(dataset[index], f"{name}[{index}]", config, tokeniser))
            except Dropped as verdict:
                left_out.setdefault(verdict.kind, []).append(index)
            except BadRow as verdict:
                if config.on_bad_row == "error":
                    raise _refused(name, index, dataset[index], verdict) from None
                left_out.setdefault(verdict.fault, []).append(index)
    for reason, places in left_out.items():
        logger.warning(
            "%s: %d of %d rows left out: %s, the first at %d",
            *(name, len(places), len(dataset), reason, places[0]),
        )
    if not len(rows):
        raise UserError(f"{name}: none of its {len(dataset)} rows is usable: {', '.join(left_out)}")
    return rows


def token_sets(train_dataset, eval_dataset, tokenise: Callable) -> tuple:
    """Both data sets as rows of token ids. Evaluation may have several, by name."""
    train = None if train_dataset is None else tokenise(train_dataset, "train_dataset")
    if isinstance(eval_dataset, Mapping):
        named = {
            key: tokenise(each, f"eval_dataset[{key!r}]") for key, each in eval_dataset.items()
        }
        return train, named
    return train, None if eval_dataset is None else tokenise(eval_dataset, "eval_dataset")


def with_lengths(dataset, tokenizer) -> list[dict[str, range]]:
    """The rows as transformers' samplers look at them that go by length: the tokens of a pair, counted."""
    name = "input_ids" if tokenizer is None else tokenizer.model_input_names[0]
    sizes = (sum(len(row[ids]) for ids in PAIRS.ids) for row in dataset)
    return [{name: range(size)} for size in sizes]


def _rows(dataset):
    """The data set without a format whose rows are tables."""
    tables = getattr(dataset, "format", None) or {}
    if isinstance(tables, Mapping) and tables.get("type") in ("pandas", "arrow", "polars"):
        return dataset.with_format(None)
    return dataset


def _first(dataset, name: str) -> Mapping[str, Any]:
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise UserError(
            f"{name} is a {type(dataset).__name__}; expected a list of rows or a map-style data set such "
            "as datasets.Dataset. Streams are trained on by dpo-fast train, with data.streaming"
        )
    if isinstance(dataset, (str, Mapping)):
        given = (
            f"the splits {', '.join(map(str, dataset))}"
            if isinstance(dataset, Mapping)
            else "a name"
        )
        raise UserError(
            f"{name} is {given}; expected one data set, datasets.load_dataset(...)[split]"
        )
    if not len(dataset):
        raise UserError(f"{name} has no rows; leave it out, or fill it")
    try:
        first = dataset[0]
    except (KeyError, IndexError, TypeError):
        raise UserError(
            f"{name} is a {type(dataset).__name__} that has no row 0; expected a list of rows or a "
            "datasets.Dataset, such as Dataset.from_pandas makes"
        ) from None
    if not isinstance(first, Mapping):
        raise UserError(
            f"{name}[0] is a {type(first).__name__}; expected a mapping of columns. {WANTED}"
        )
    return first


def _check_answers(dataset, name: str) -> None:
    """Raises UserError where the ids of the first answers are those of prompt and answer."""
    rows = [dataset[index] for index in range(min(len(dataset), LOOKED_AT))]
    prompt, *answers = PAIRS.ids
    for row in rows:
        begins = list(row[prompt])
        if len(begins) < 2 or any(list(row[each][: len(begins)]) != begins for each in answers):
            return
    raise UserError(
        f"{name}: {' and '.join(answers)} begin with {prompt}, in the first {len(rows)} rows; an answer "
        f"begins at its first scored token: row[{answers[0]!r}][len(row[{prompt!r}]):]"
    )


def _check_ids(row: Mapping[str, Any], name: str) -> None:
    """Raises UserError for rows of token ids of another shape."""
    found = {theirs: ours for theirs, ours in ELSEWHERE.items() if theirs in row}
    if found:
        raise UserError(
            f"{name} has token ids under other names: {name}.rename_columns({found}). Masks and labels "
            "are not needed: every token of an answer is scored, or those that chosen_scored and "
            "rejected_scored say"
        )
    if "input_ids" in row:
        raise UserError(
            f"{name} has the columns {_names(row)}: one sequence and its labels. A pair is prompt_ids, "
            "chosen_ids and rejected_ids, lists of int, where an answer begins at its first scored token; "
            "nothing is shifted. Or give the texts, which are tokenised here"
        )
    some = [column for column in PAIRS.ids if row.get(column) is not None]
    if some:
        missing = [column for column in PAIRS.ids if column not in some]
        raise UserError(f"{name} has {', '.join(some)} and no {', '.join(missing)}. {WANTED}")


def _config(options: Mapping[str, Any]) -> DataConfig:
    known = [option for option in OPTIONS if option in DataConfig.model_fields]
    if unknown := [option for option in options if option not in known]:
        raise UserError(f"data_options={unknown}: choose from {', '.join(known)}")
    try:
        return DataConfig.model_validate({"train": "train_dataset"} | dict(options))
    except ValidationError as error:
        texts = (each["msg"].removeprefix("Value error, ") for each in error.errors())
        raise UserError(f"data_options={dict(options)}: {'; '.join(texts)}") from None


def _tokenised(row: Mapping, where: str, config: DataConfig, tokeniser: RowTokeniser) -> dict:
    parsed = parse_row(where, row, config)
    if parsed.kind != PAIRS:
        raise UserError(
            f"{where} is {parsed.kind.one}; this trainer takes pairs: use dpo-fast train. {WANTED}"
        )
    if parsed.optional.get(IMAGES):
        raise UserError(f"{where} has images: this trainer takes text alone; use dpo-fast train")
    ids = vars(tokeniser(parsed))
    flags = {name: ids[name] for name in PAIRS.scored if ids[name] is not None}
    return {name: ids[name] for name in PAIRS.ids} | flags | values(parsed)


def _refused(name: str, index: int, row: Mapping, verdict: BadRow) -> UserError:
    error = f"{name}[{index}]: {verdict}"
    if index == 0:  # more likely the form of all rows than this one
        error += f". Its columns are {_names(row)}. {WANTED}"
        return UserError(f"{error}; name your columns with data_options={{'columns': ...}}")
    return UserError(f"{error}. Mend the row, or pass data_options={{'on_bad_row': 'skip'}}")


def _names(row: Mapping) -> str:
    return ", ".join(map(str, row))
