"""A raw row becomes a row of one kind (PairRow, CompletionRow, ...), or a BadRow that says why not."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar

from dpo_fast.data import values
from dpo_fast.data.config import CHAT_COLUMNS, IMAGES, DataConfig
from dpo_fast.data.demonstrations import best_of, demonstration, scores_of
from dpo_fast.data.files import Cell
from dpo_fast.data.forms.instructions import opened
from dpo_fast.data.forms.table import find_form
from dpo_fast.data.forms.unused import check_unused
from dpo_fast.data.images.columns import take_images
from dpo_fast.data.images.marks import check_images
from dpo_fast.data.kinds import COMPLETIONS, DEMONSTRATIONS, GROUPS, PAIRS, Kind
from dpo_fast.data.messages import Messages
from dpo_fast.data.prompts import (
    as_chat,
    is_dialogue,
    joined,
    split_conversations,
    split_texts,
    with_prompt,
)
from dpo_fast.data.row_parts import check_chat_columns, check_texts, read_prompt, with_system
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


@dataclass(frozen=True)
class DemonstrationRow(_Row):
    """One answer to learn. Otherwise as `PairRow`."""

    where: str
    prompt: str | Messages
    completion: str | Messages
    optional: dict[str, Any]
    kind: ClassVar[Kind] = DEMONSTRATIONS


Row = PairRow | CompletionRow | GroupRow | DemonstrationRow
ROW_TYPES: dict[Kind, type[Row]] = {
    each.kind: each for each in (PairRow, CompletionRow, GroupRow, DemonstrationRow)
}
FORMATS = {"unpaired": COMPLETIONS, "groups": GROUPS}  # data.format; others are pairs, or forms
SFT = "sft"  # the format that makes a demonstration of any row
# Other names of our columns. Those of answers count only together.
ALIASES = {"kto_tag": "label", "system_prompt": "system"}
# Columns that a row may lack where others have them: in JSON an empty one is often left out.
LEFT_OUT = ("system", "history", "input", "query", *CHAT_COLUMNS, IMAGES)
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
    left = opened(_renamed(raw, config))
    images = take_images(left)
    format_ = "auto" if config.format == SFT else config.format
    form = find_form(left, format_, config.columns)
    row = form.convert(left) if form else {}
    kind = _kind(row or left, "auto" if form else format_)
    row |= _take(left, row, kind)
    _check_mapped(left, kind, config)
    if unused is not None:
        unused |= {name for name, value in left.items() if value is not None}
    parsed = (LEARN if config.format == SFT else PARSE)[kind](where, row, raw, config)
    if "system" in row and not parsed.is_chat:
        left[config.columns.get("system", "system")] = row["system"]
    if images:
        check_images(parsed.prompt, parsed.answers, len(images))
        parsed.optional[IMAGES] = images
    if left:
        has_prompt = form or row.get("prompt") is not None or (parsed.is_chat and parsed.prompt)
        check_unused(left, parsed, bool(has_prompt), bool(images))
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
    kind = max(found, key=found.get)
    if kind == GROUPS and found[GROUPS]:
        return GROUPS
    if found[COMPLETIONS]:
        return COMPLETIONS if "label" in row else DEMONSTRATIONS
    named_otherwise = "prompt" in given and given & set(values.SYNONYMS["completion"])
    return DEMONSTRATIONS if named_otherwise else PAIRS


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
        prompt = read_prompt(row["prompt"])
        prompt, chosen, rejected = with_prompt(prompt, chosen, rejected)
    elif isinstance(chosen, str):
        prompt, chosen, rejected = split_texts(chosen, rejected, config.prompt_end)
    else:
        prompt, chosen, rejected = split_conversations(chosen, rejected)
    prompt, (chosen, rejected) = as_chat(prompt, [chosen, rejected], row, config)
    prompt = with_system(prompt, row)
    check_texts(prompt, {"chosen": chosen, "rejected": rejected})
    optional = values.optional(row, PAIRS)
    check_chat_columns(prompt, optional)
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
    prompt, completions = joined(read_prompt(row["prompt"]), [completion])
    prompt, (completion,) = as_chat(prompt, completions, row, config)
    prompt = with_system(prompt, row)
    check_texts(prompt, {"completion": completion})
    values.need(row, raw, "label")
    label = values.label(row["label"])
    optional = values.optional(row, COMPLETIONS)
    check_chat_columns(prompt, optional)
    return CompletionRow(where, prompt, completion, label, optional)


def _group(
    where: str, row: dict[str, Any], raw: Mapping[str, Any], config: DataConfig
) -> GroupRow | PairRow:
    values.need(row, raw, "prompt")
    completions = values.items(row, raw, "completions")
    scores = scores_of(row, raw, len(completions))
    if len(completions) < 2:
        raise BadRow("a group of one", f"got {len(completions)} completions; a group has 2 or more")
    named = ((f"completions[{index}]", each) for index, each in enumerate(completions))
    texts = [values.text_or_messages(each, name) for name, each in named]
    if len({type(each) for each in texts}) > 1:
        raise BadRow("completions differ in kind", "some are text, others message lists")
    prompt, texts = joined(read_prompt(row["prompt"]), texts)
    prompt, texts = as_chat(prompt, texts, row, config)
    prompt = with_system(prompt, row)
    group = GroupRow(where, prompt, texts, scores, values.optional(row, GROUPS))
    check_texts(prompt, group.answers)
    check_chat_columns(prompt, group.optional)
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


def _demonstration(
    where: str, row: dict[str, Any], raw: Mapping[str, Any], config: DataConfig
) -> DemonstrationRow:
    return DemonstrationRow(where, *demonstration(row, raw, config))


def _chosen(
    where: str, row: dict[str, Any], raw: Mapping[str, Any], config: DataConfig
) -> DemonstrationRow:
    """The chosen answer of a pair. The rejected one tells where the prompt ends, if it is in order."""
    with suppress(BadRow, Dropped):
        pair = _pair(where, row, raw, config)
        return _learnt(where, pair.prompt, pair.chosen, pair.optional)
    alone = {name: value for name, value in row.items() if name not in PAIRS.answers}
    alone |= {
        "completion": values.answer(row, raw, "chosen"),
        "finish_reason": row.get("chosen_finish_reason"),
    }
    return _demonstration(where, alone, raw, config)


def _desirable(
    where: str, row: dict[str, Any], raw: Mapping[str, Any], config: DataConfig
) -> DemonstrationRow:
    parsed = _completion(where, row, raw, config)
    if not parsed.label:
        raise Dropped("undesirable", "data.format=sft learns completions whose label is true")
    return _learnt(where, parsed.prompt, parsed.completion, parsed.optional)


def _best(
    where: str, row: dict[str, Any], raw: Mapping[str, Any], config: DataConfig
) -> DemonstrationRow:
    return _demonstration(where, best_of(row, raw), raw, config)


def _learnt(
    where: str, prompt: str | Messages, answer: str | Messages, optional: dict[str, Any]
) -> DemonstrationRow:
    """The first of a row's answers, with those of the row's optional columns that it uses."""
    cut = optional.get("unfinished", [False])[0]
    used = {*DEMONSTRATIONS.numbers, *CHAT_COLUMNS}
    kept = {name: value for name, value in optional.items() if name in used}
    return DemonstrationRow(where, prompt, answer, kept | ({"unfinished": [True]} if cut else {}))


PARSE = {PAIRS: _pair, COMPLETIONS: _completion, GROUPS: _group, DEMONSTRATIONS: _demonstration}
LEARN = {PAIRS: _chosen, COMPLETIONS: _desirable, GROUPS: _best, DEMONSTRATIONS: _demonstration}


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


def _check_format(chosen: str | Messages, config: DataConfig) -> None:
    found = "pairs" if isinstance(chosen, str) else "messages"
    if config.format in ("pairs", "messages") and config.format != found:
        raise BadRow(f"not in data.format={config.format}", f"the answers are in format {found}")
