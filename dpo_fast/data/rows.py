"""A raw row becomes a PairRow, CompletionRow or GroupRow, or a BadRow that says why not."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from dpo_fast.data import values
from dpo_fast.data.config import CHAT_COLUMNS, DataConfig
from dpo_fast.data.files import Cell
from dpo_fast.data.forms.table import find_form
from dpo_fast.data.forms.unused import check_unused
from dpo_fast.data.kinds import COMPLETIONS, GROUPS, PAIRS, Kind
from dpo_fast.data.messages import Messages, say
from dpo_fast.data.prompts import (
    as_chat,
    check_answer,
    is_dialogue,
    joined,
    split_conversations,
    split_texts,
    with_prompt,
)
from dpo_fast.data.verdicts import BadRow, Dropped
from dpo_fast.errors import UserError


class _Row:
    """What all rows have: `kind`, where they came from, a prompt, answers and optional columns."""

    @property
    def is_chat(self) -> bool:
        return not isinstance(self.prompt, str)

    @property
    def answers(self) -> dict[str, str | Messages]:
        """What follows the prompt, by name."""
        return {name: getattr(self, name) for name in self.kind.answers}

    @property
    def unfinished(self) -> list[bool]:
        """Whether each answer was cut off, and has no end of turn."""
        return self.optional.get("unfinished") or [False] * len(self.answers)


@dataclass(frozen=True)
class PairRow(_Row):
    """One pair, checked but not tokenised.

    where: the row's place, as in "pairs.jsonl:17".
    prompt, chosen, rejected: all text, or all lists of messages `{"role": str, "content": str, ...}`.
        A prompt of messages ends before the first scored message.
    optional: the optional columns that the row has: floats, `tools`, `chat_template_kwargs`; and
        `unfinished`, if any answer was cut off.
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
FORMATS = {"unpaired": COMPLETIONS, "groups": GROUPS}  # data.format; others are pairs, or forms
# Other names of our columns. Those of answers count only together.
ALIASES = {"kto_tag": "label", "system_prompt": "system"}
# Columns that a row may lack where others have them: in JSON an empty one is often left out.
LEFT_OUT = ("system", "history", "input", "query", *CHAT_COLUMNS)
RESPONSES = {"chosen_response": "chosen", "rejected_response": "rejected"}


def parse_row(
    where: str, raw: Mapping[str, Any], config: DataConfig, unused: set[str] | None = None
) -> Row:
    """Finds the row's form, checks it and finds its prompt.

    unused: gets the names of columns that are passed over.

    Raises:
        BadRow: a mistake in the row, or a column of words that nothing uses.
        Dropped: none of its answers is preferred, or one is empty.
    """
    left = _renamed(raw, config)
    form = find_form(left, config.format, config.columns)
    row = form.convert(left) if form else {}
    kind = _kind(row or left, "auto" if form else config.format)
    row |= _take(left, row, kind)
    _check_mapped(left, kind, config)
    if unused is not None:
        unused |= {name for name, value in left.items() if value is not None}
    parse = {PAIRS: _pair, COMPLETIONS: _completion, GROUPS: _group}[kind]
    parsed = parse(where, row, raw, config)
    if "system" in row and not parsed.is_chat:
        left[config.columns.get("system", "system")] = row["system"]
    if left:
        has_prompt = form or row.get("prompt") is not None or (parsed.is_chat and parsed.prompt)
        check_unused(left, parsed, bool(has_prompt))
    return parsed


def check_found(absent: Collection[str], part: str, config: DataConfig) -> None:
    """Raises UserError for columns that data.columns names and that no row has.

    part: what the configuration calls the data.
    """
    for ours, theirs in config.columns.items():
        if theirs in absent:
            raise UserError(
                f"{part}.columns.{ours}={theirs!r} is not used: no row has this column; remove it, or "
                "correct its name"
            )


def _kind(row: Mapping[str, Any], format_: str) -> Kind:
    """The kind that data.format asks for, or the one that the row's columns fit best."""
    if format_ != "auto":
        return FORMATS.get(format_, PAIRS)
    given = {name for name, value in row.items() if value is not None}
    if given & set(PAIRS.answers):
        return PAIRS
    found = {
        kind: len(given & {*kind.answers, *kind.label_columns}) for kind in (COMPLETIONS, GROUPS)
    }
    return max(found, key=found.get) if any(found.values()) else PAIRS


def _take(left: dict[str, Any], row: Mapping[str, Any], kind: Kind) -> dict[str, Any]:
    """Takes the columns of a kind out of `left`, but for those that a form has made."""
    names = ("prompt", "system", *kind.answers, *kind.label_columns, *kind.numbers, *CHAT_COLUMNS)
    names += kind.reason_columns
    return {name: left.pop(name) for name in names if name in left and name not in row}


def _pair(where: str, row: dict[str, Any], raw: Mapping[str, Any], config: DataConfig) -> PairRow:
    chosen, rejected = (values.answer(row, raw, name) for name in PAIRS.answers)
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise BadRow("chosen and rejected differ in kind", "one is text, the other a message list")
    _check_format(chosen, config)
    if chosen == rejected:
        raise Dropped("chosen equals rejected", "neither answer is preferred")
    if isinstance(chosen, str) and "prompt" in row and row["prompt"] is None:
        _check_null_prompt(row, (chosen, rejected), config)
    if row.get("prompt") is not None:
        prompt = _prompt(row["prompt"])
        prompt, chosen, rejected = with_prompt(prompt, chosen, rejected)
    elif isinstance(chosen, str):
        prompt, chosen, rejected = split_texts(chosen, rejected, config.prompt_end)
    else:
        prompt, chosen, rejected = split_conversations(chosen, rejected)
    prompt, (chosen, rejected) = as_chat(prompt, [chosen, rejected], row, config)
    prompt = _with_system(prompt, row)
    _check_texts(prompt, {"chosen": chosen, "rejected": rejected})
    optional = values.optional(row, PAIRS)
    _check_chat_columns(prompt, optional)
    return PairRow(where, prompt, chosen, rejected, optional)


def _check_null_prompt(row: dict[str, Any], answers: tuple[str, str], config: DataConfig) -> None:
    """Of texts that do not tell where a prompt ends, the prompt is missing. An empty cell of CSV is empty.

    Raises BadRow.
    """
    if config.prompt_end is not None or is_dialogue(answers[0]):
        return
    if isinstance(row["chosen"], Cell):
        row["prompt"] = ""
    elif split_texts(*answers, None)[0]:
        raise BadRow(
            "field 'prompt' is null",
            "an empty prompt is an empty text; if prompts are to be what both answers begin with, list "
            "'prompt' in data.ignore_columns",
        )


def _completion(
    where: str, row: dict[str, Any], raw: Mapping[str, Any], config: DataConfig
) -> CompletionRow:
    values.need(row, raw, "prompt")
    completion = values.answer(row, raw, "completion")
    prompt, completions = joined(_prompt(row["prompt"]), [completion])
    prompt, (completion,) = as_chat(prompt, completions, row, config)
    prompt = _with_system(prompt, row)
    _check_texts(prompt, {"completion": completion})
    values.need(row, raw, "label")
    label = values.label(row["label"])
    optional = values.optional(row, COMPLETIONS)
    _check_chat_columns(prompt, optional)
    return CompletionRow(where, prompt, completion, label, optional)


def _group(
    where: str, row: dict[str, Any], raw: Mapping[str, Any], config: DataConfig
) -> GroupRow | PairRow:
    values.need(row, raw, "prompt")
    completions, column = values.items(row, raw, "completions"), _score_column(row)
    scores = values.items(row, raw, column)
    if len(completions) < 2:
        raise BadRow("a group of one", f"got {len(completions)} completions; a group has 2 or more")
    if len(scores) != len(completions):
        raise BadRow(
            f"{column} and completions differ in number", f"{len(scores)} and {len(completions)}"
        )
    named = ((f"completions[{index}]", each) for index, each in enumerate(completions))
    texts = [values.text_or_messages(each, name) for name, each in named]
    if len({type(each) for each in texts}) > 1:
        raise BadRow("completions differ in kind", "some are text, others message lists")
    prompt, texts = joined(_prompt(row["prompt"]), texts)
    prompt, texts = as_chat(prompt, texts, row, config)
    prompt = _with_system(prompt, row)
    numbers = [values.number(each, f"{column}[{index}]") for index, each in enumerate(scores)]
    if column == "ranks":
        numbers = [-number for number in numbers]
    group = GroupRow(where, prompt, texts, numbers, values.optional(row, GROUPS))
    _check_texts(prompt, group.answers)
    _check_chat_columns(prompt, group.optional)
    return group if config.group_pairs is None else _best_and_worst(group)


def _best_and_worst(group: GroupRow) -> PairRow:
    """The pair of data.group_pairs=best_worst; the first of several that are as good."""
    best, worst = (group.scores.index(pick(group.scores)) for pick in (max, min))
    chosen, rejected = group.completions[best], group.completions[worst]
    if best == worst or chosen == rejected:
        raise Dropped("a tie", "the best and the worst answer are as good, or the same")
    optional = dict(group.optional)
    if "unfinished" in optional:
        optional["unfinished"] = [optional["unfinished"][place] for place in (best, worst)]
    return PairRow(group.where, group.prompt, chosen, rejected, optional)


def _score_column(row: dict[str, Any]) -> str:
    """`scores`, higher is better, or `ranks`, lower is better. Raises BadRow if the row has both."""
    given = [name for name in GROUPS.label_columns if row.get(name) is not None]
    if len(given) > 1:
        raise BadRow("scores and ranks", "both say how good completions are: give one of them")
    return given[0] if given else GROUPS.label_columns[0]


def _renamed(raw: Mapping[str, Any], config: DataConfig) -> dict[str, Any]:
    """The row with our names where data.columns or an alias has them, without ignored columns."""
    row = {name: value for name, value in raw.items() if name not in config.ignore_columns}
    columns = {ours: theirs for ours, theirs in config.columns.items() if theirs in raw}
    for ours, theirs in config.columns.items():
        if ours not in columns and (ours not in LEFT_OUT or ours in raw):
            raise BadRow(
                f"missing field {theirs!r}",
                f"data.columns.{ours} names it; {values.seen(raw, theirs)}",
            )
    for theirs in config.columns.values():
        row.pop(theirs, None)
    row |= {ours: raw[theirs] for ours, theirs in columns.items()}
    aliases = ALIASES | (RESPONSES if set(RESPONSES) <= set(row) else {})
    for theirs, ours in aliases.items():
        if row.get(theirs) is not None and row.get(ours) is None:
            row[ours] = row.pop(theirs)
    return {name: values.unpacked(name, value) for name, value in row.items()}


def _check_mapped(left: Mapping[str, Any], kind: Kind, config: DataConfig) -> None:
    for ours, theirs in config.columns.items():
        if left.get(ours) is not None:
            known = ", ".join(
                ("prompt", "system", *kind.answers, *kind.label_columns, *kind.numbers)
            )
            raise BadRow(
                f"data.columns.{ours}={theirs!r} is not used",
                f"the row is {kind.one}, whose columns are {known}; remove it, or set data.format",
            )


def _prompt(value: Any) -> str | Messages:
    """The prompt, which may be an empty list."""
    return [] if isinstance(value, list) and not value else values.text_or_messages(value, "prompt")


def _with_system(prompt: str | Messages, row: Mapping[str, Any]) -> str | Messages:
    """The prompt with the column `system` for its first message."""
    system = row.get("system")
    if isinstance(prompt, str) or system is None or system == "":
        return prompt
    if not isinstance(system, str):
        raise BadRow("field 'system' is not text", f"got {type(system).__name__}")
    if prompt and prompt[0]["role"] in ("system", "developer"):
        if prompt[0]["content"].strip() != system.strip():
            raise BadRow("two system messages", "the column 'system' and the first message differ")
        return prompt
    return [say("system", system), *prompt] if system.strip() else prompt


def _check_format(chosen: str | Messages, config: DataConfig) -> None:
    found = "pairs" if isinstance(chosen, str) else "messages"
    if config.format in ("pairs", "messages") and config.format != found:
        raise BadRow(f"not in data.format={config.format}", f"the answers are in format {found}")


def _check_texts(prompt: str | Messages, answers: dict[str, str | Messages]) -> None:
    if isinstance(prompt, str):
        texts = {"prompt": prompt, **answers} if prompt else answers
        for name, text in texts.items():
            if not text.strip():
                verdict = BadRow if name == "prompt" else Dropped
                raise verdict(f"empty {name}", "expected text, got only white space")
        return
    last = prompt[-1] if prompt else None
    if last and last["role"] != "tool" and not last["content"].strip():
        raise BadRow("empty prompt", f"its last message ({last['role']}) has no text")
    for name, answer in answers.items():
        check_answer(answer, name)


def _check_chat_columns(prompt: str | Messages, optional: dict[str, Any]) -> None:
    unused = [name for name in CHAT_COLUMNS if name in optional]
    if isinstance(prompt, str) and unused:
        raise BadRow(
            f"{unused[0]} without messages",
            "it needs a chat template, and the row is text; give messages, or list the column in "
            "data.ignore_columns",
        )
