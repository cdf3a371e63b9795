"""A raw row becomes a PairRow, CompletionRow or GroupRow, or a BadRow that says why not."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from dpo_fast.data.config import CHAT_COLUMNS, COLUMNS, TEMPLATE_ARGUMENTS, DataConfig
from dpo_fast.data.kinds import COMPLETIONS, GROUPS, PAIRS, Kind
from dpo_fast.data.prompts import (
    Messages,
    check_answer,
    check_messages,
    joined,
    split_conversations,
    split_texts,
    with_prompt,
)
from dpo_fast.data.verdicts import BadRow


class _Row:
    """What all rows have: `kind`, where they came from, a prompt, answers and optional columns."""

    @property
    def is_chat(self) -> bool:
        return not isinstance(self.prompt, str)

    @property
    def answers(self) -> dict[str, str | Messages]:
        """What follows the prompt, by name."""
        return {name: getattr(self, name) for name in self.kind.answers}


@dataclass(frozen=True)
class PairRow(_Row):
    """One pair, checked but not tokenised.

    where: the row's place, as in "pairs.jsonl:17".
    prompt, chosen, rejected: all text, or all lists of messages `{"role": str, "content": str, ...}`.
        A prompt of messages ends before the first scored message.
    optional: the optional columns that the row has: floats, `tools`, `chat_template_kwargs`.
    """

    where: str
    prompt: str | Messages
    chosen: str | Messages
    rejected: str | Messages
    optional: dict[str, Any]
    kind: ClassVar[Kind] = PAIRS


@dataclass(frozen=True)
class CompletionRow(_Row):
    """One completion; label: true for a desirable one. Otherwise as `PairRow`."""

    where: str
    prompt: str | Messages
    completion: str | Messages
    label: bool
    optional: dict[str, Any]
    kind: ClassVar[Kind] = COMPLETIONS


@dataclass(frozen=True)
class GroupRow(_Row):
    """Two or more completions of one prompt. Otherwise as `PairRow`.

    scores: one for each completion, higher is better. Ranks become negative scores.
    """

    where: str
    prompt: str | Messages
    completions: list[str] | list[Messages]
    scores: list[float]
    optional: dict[str, Any]
    kind: ClassVar[Kind] = GROUPS

    @property
    def answers(self) -> dict[str, str | Messages]:
        return {f"completions[{index}]": each for index, each in enumerate(self.completions)}


Row = PairRow | CompletionRow | GroupRow
ROW_TYPES: dict[Kind, type[Row]] = {each.kind: each for each in (PairRow, CompletionRow, GroupRow)}
FORMATS = {"unpaired": COMPLETIONS, "groups": GROUPS}  # data.format; all others are pairs


def parse_row(where: str, raw: Mapping[str, Any], config: DataConfig) -> Row:
    """Checks `raw` and finds its prompt. Raises BadRow."""
    row = _renamed(raw, config)
    parse = {PAIRS: _pair, COMPLETIONS: _completion, GROUPS: _group}[_kind(row, config)]
    return parse(where, row, raw, config)


def _kind(row: Mapping[str, Any], config: DataConfig) -> Kind:
    """The kind that data.format asks for, or the one that the row's columns fit best."""
    if config.format != "auto":
        return FORMATS.get(config.format, PAIRS)
    given = {name for name, value in row.items() if value is not None}
    if given & set(PAIRS.answers):
        return PAIRS
    found = {
        kind: len(given & {*kind.answers, *kind.label_columns}) for kind in (COMPLETIONS, GROUPS)
    }
    return max(found, key=found.get) if any(found.values()) else PAIRS


def _pair(where: str, row: dict[str, Any], raw: Mapping[str, Any], config: DataConfig) -> PairRow:
    chosen, rejected = _answer(row, raw, "chosen"), _answer(row, raw, "rejected")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise BadRow("chosen and rejected differ in kind", "one is text, the other a message list")
    _check_format(chosen, config)
    if chosen == rejected:
        raise BadRow("chosen equals rejected", "a pair needs two different answers")
    if "prompt" in row:
        prompt, chosen, rejected = with_prompt(_value(row["prompt"], "prompt"), chosen, rejected)
    elif isinstance(chosen, str):
        prompt, chosen, rejected = split_texts(chosen, rejected, config.prompt_end)
    else:
        prompt, chosen, rejected = split_conversations(chosen, rejected)
    _check_texts(prompt, {"chosen": chosen, "rejected": rejected})
    optional = _optional(row, PAIRS)
    _check_chat_columns(prompt, optional)
    return PairRow(where, prompt, chosen, rejected, optional)


def _completion(
    where: str, row: dict[str, Any], raw: Mapping[str, Any], config: DataConfig
) -> CompletionRow:
    prompt, (completion,) = joined(_answer(row, raw, "prompt"), [_answer(row, raw, "completion")])
    _check_texts(prompt, {"completion": completion})
    _need(row, raw, "label")
    if not isinstance(row["label"], bool):
        raise BadRow("field 'label' is not a bool", f"expected true or false, got {row['label']!r}")
    optional = _optional(row, COMPLETIONS)
    _check_chat_columns(prompt, optional)
    return CompletionRow(where, prompt, completion, row["label"], optional)


def _group(where: str, row: dict[str, Any], raw: Mapping[str, Any], config: DataConfig) -> GroupRow:
    prompt = _answer(row, raw, "prompt")
    completions, column = _list(row, raw, "completions"), _score_column(row)
    scores = _list(row, raw, column)
    if len(completions) < 2:
        raise BadRow("a group of one", f"got {len(completions)} completions; a group has 2 or more")
    if len(scores) != len(completions):
        raise BadRow(
            f"{column} and completions differ in number", f"{len(scores)} and {len(completions)}"
        )
    texts = [_value(each, f"completions[{index}]") for index, each in enumerate(completions)]
    if len({type(each) for each in texts}) > 1:
        raise BadRow("completions differ in kind", "some are text, others message lists")
    prompt, texts = joined(prompt, texts)
    numbers = [_number(each, f"{column}[{index}]") for index, each in enumerate(scores)]
    if column == "ranks":
        numbers = [-number for number in numbers]
    group = GroupRow(where, prompt, texts, numbers, _optional(row, GROUPS))
    _check_texts(prompt, group.answers)
    _check_chat_columns(prompt, group.optional)
    return group


def _score_column(row: dict[str, Any]) -> str:
    """`scores`, higher is better, or `ranks`, lower is better. Raises BadRow if the row has both."""
    given = [name for name in GROUPS.label_columns if row.get(name) is not None]
    if len(given) > 1:
        raise BadRow("scores and ranks", "both say how good completions are: give one of them")
    return given[0] if given else GROUPS.label_columns[0]


def ignored_columns(raw: Mapping[str, Any], config: DataConfig) -> set[str]:
    """The columns of a raw row that parse_row does not look at."""
    row = _known(raw, config)
    kind = _kind(row, config)
    used = {"prompt", *kind.answers, *kind.numbers, *CHAT_COLUMNS, *kind.label_columns}
    return set(raw) - {config.columns.get(name, name) for name in used}


def _renamed(raw: Mapping[str, Any], config: DataConfig) -> dict[str, Any]:
    for ours, theirs in config.columns.items():
        if theirs not in raw:
            raise BadRow(
                f"missing field {theirs!r}", f"data.columns.{ours} names it; {_seen(raw, theirs)}"
            )
    return _known(raw, config)


def _known(raw: Mapping[str, Any], config: DataConfig) -> dict[str, Any]:
    """The columns that we know, under our names."""
    names = {ours: config.columns.get(ours, ours) for ours in COLUMNS}
    return {ours: raw[theirs] for ours, theirs in names.items() if theirs in raw}


def _seen(raw: Mapping[str, Any], wanted: str) -> str:
    near = difflib.get_close_matches(wanted, list(raw), n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"the row has {', '.join(map(repr, raw)) or 'no fields'}{hint}"


def _answer(row: dict[str, Any], raw: Mapping[str, Any], name: str) -> str | Messages:
    _need(row, raw, name)
    return _value(row[name], name)


def _list(row: dict[str, Any], raw: Mapping[str, Any], name: str) -> list:
    _need(row, raw, name)
    if not isinstance(row[name], list):
        got = "null" if row[name] is None else type(row[name]).__name__
        raise BadRow(
            f"field {name!r} is not a list", f"expected one entry for each completion, got {got}"
        )
    return row[name]


def _need(row: dict[str, Any], raw: Mapping[str, Any], name: str) -> None:
    if name not in row:
        raise BadRow(
            f"missing field {name!r}",
            f"{_seen(raw, name)}; data.columns.{name}=... names another column",
        )


def _value(value: Any, name: str) -> str | Messages:
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise BadRow(f"field {name!r} is not Unicode text", "it has a lone surrogate") from None
        return value
    if isinstance(value, Mapping):
        return check_messages([value], name)
    if isinstance(value, list):
        return check_messages(value, name)
    kind = "null" if value is None else type(value).__name__
    raise BadRow(f"field {name!r} has the wrong type", f"expected text or messages, got {kind}")


def _check_format(chosen: str | Messages, config: DataConfig) -> None:
    found = "pairs" if isinstance(chosen, str) else "messages"
    if config.format not in ("auto", found):
        raise BadRow(f"not in data.format={config.format}", f"the answers are in format {found}")


def _check_texts(prompt: str | Messages, answers: dict[str, str | Messages]) -> None:
    if isinstance(prompt, str):
        for name, text in {"prompt": prompt, **answers}.items():
            if not text.strip():
                raise BadRow(f"empty {name}", "expected text, got only white space")
        return
    last = prompt[-1]
    if last["role"] == "assistant":
        raise BadRow("prompt ends with an assistant message", "the answer follows the prompt")
    if last["role"] != "tool" and not last["content"].strip():
        raise BadRow("empty prompt", f"its last message ({last['role']}) has no text")
    for name, answer in answers.items():
        check_answer(answer, name)


def _check_chat_columns(prompt: str | Messages, optional: dict[str, Any]) -> None:
    unused = [name for name in CHAT_COLUMNS if name in optional]
    if isinstance(prompt, str) and unused:
        raise BadRow(f"{unused[0]} without messages", "it needs a chat template; the row is text")


def _optional(row: dict[str, Any], kind: Kind) -> dict[str, Any]:
    optional = {
        name: _number(row[name], name) for name in kind.numbers if row.get(name) is not None
    }
    if not 0 <= optional.get("soft_label", 0) <= 1:
        raise BadRow(
            "field 'soft_label' is out of range", f"{optional['soft_label']} is not in 0..1"
        )
    if optional.get("weight", 0) < 0:
        raise BadRow("field 'weight' is out of range", f"{optional['weight']} is below 0")
    given = [name for name in kind.reference_columns if name in optional]
    if 0 < len(given) < len(kind.reference_columns):
        raise BadRow(f"{given[0]} without its partner", "give both reference columns or neither")
    for name, shape in (("tools", list), ("chat_template_kwargs", dict)):
        if row.get(name):
            optional[name] = _structure(row[name], name, shape)
    clash = set(optional.get("chat_template_kwargs", ())) & set(TEMPLATE_ARGUMENTS)
    if clash:
        raise BadRow(f"chat_template_kwargs sets {min(clash)!r}", "it is set by dpo_fast itself")
    return optional


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise BadRow(f"field {name!r} is not a number", f"got {value!r}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise BadRow(f"field {name!r} is not finite", f"got {number}")
    return number


def _structure(value: Any, name: str, shape: type) -> Any:
    # Arrow cannot hold free-form objects, so such columns often arrive as JSON text.
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise BadRow(f"field {name!r} is not JSON", str(error)) from None
    if not isinstance(value, shape):
        expected = {list: "a list", dict: "an object"}[shape]
        raise BadRow(f"field {name!r} has the wrong type", f"expected {expected}")
    return (
        {key: item for key, item in value.items() if item is not None} if shape is dict else value
    )
