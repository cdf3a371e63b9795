"""The prompts of a round: read from rows of any form that `train` reads, and from rows without answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from dpo_fast.data import values
from dpo_fast.data.config import IMAGES, DataConfig
from dpo_fast.data.forms.conversations import CONVERSATIONS
from dpo_fast.data.images.columns import COLUMNS as IMAGE_COLUMNS
from dpo_fast.data.images.rows import in_memory, keep_images
from dpo_fast.data.kinds import DEMONSTRATIONS
from dpo_fast.data.messages import Messages, are_messages, check_messages, messages_in, say
from dpo_fast.data.parts import parts_of
from dpo_fast.data.rows import SFT, CompletionRow, Row, parse_row
from dpo_fast.data.verdicts import BadRow, BadRows, Dropped, Tally
from dpo_fast.errors import UserError
from dpo_fast.generation.config import SampleSection
from dpo_fast.progress import shown
from dpo_fast.wording import printable

PROBE = "Zyzzyva"  # stands for the answer that a row does not have
# A row with one of them has answers, of which its form tells what comes before them.
ANSWERS = (
    *("chosen", "rejected", "completions", "generations", "answers", "output", "response"),
    *(
        "completion",
        "rejected_response",
        "rejected_messages",
        "chosen_response",
        "preferred_output",
    ),
    *("response_0", "response_1", "response1", "human_ref_A", "conversation_a"),
)
# What tells that an answer is one of several, or how good it is.
JUDGED = (
    *("label", "kto_tag", "rejected", "scores", "ranks", "ratings", "rejected_response"),
    *("rejected_messages", "preference_strength", "overall_preference", "better_response_id"),
    *("labels", "winner", "helpfulness", "non_preferred_output"),
)
# What comes before answers in a row that has them; without it they tell where the prompt ends.
BEFORE = ("prompt", "instruction", "question", "query", "input", "context", "history")
BEFORE += ("conversation_a", "conversation_b")
# Verdicts that prefer one of two.
DECIDED = {"winner": "model_a", "overall_preference": -1, "preference_strength": -1}
DECIDED |= {"helpfulness": [1, 0]}
PROMPT_COLUMNS = ("prompt", "system", "tools", "chat_template_kwargs")


@dataclass(frozen=True)
class Prompt:
    """What completions follow.

    where: file and line. prompt: text, or messages. optional: `tools` and `chat_template_kwargs`.
    row: the other columns of its row, for judges.
    images: as `keep_images` leaves them; the prompt has their marks.
    """

    where: str
    prompt: str | Messages
    optional: dict[str, Any] = field(default_factory=dict)
    row: dict[str, Any] = field(default_factory=dict)
    images: list[dict[str, Any]] = field(default_factory=list)

    @property
    def is_chat(self) -> bool:
        return not isinstance(self.prompt, str)

    @property
    def key(self) -> str:
        """The same for prompts that a model cannot tell apart."""
        images = [self._shown_images] if self.images else []
        return json.dumps([self.prompt, self.optional, *images], sort_keys=True)

    @property
    def facts(self) -> dict[str, Any]:
        """All of it, as JSON has it."""
        shown = {name: value for name, value in vars(self).items() if name != "images"}
        return shown | ({"images": self._shown_images} if self.images else {})

    @property
    def _shown_images(self) -> list[list[str]]:
        return [[each["digest"].hex(), each["options"]] for each in self.images]

    def answered(self, completion: str, unfinished: bool = False) -> CompletionRow:
        """A row with a completion, as `train` would tokenise it."""
        answer = [say("assistant", completion)] if self.is_chat else completion
        optional = self.optional | ({"unfinished": [True]} if unfinished else {})
        optional |= {IMAGES: self.images} if self.images else {}
        return CompletionRow(self.where, self.prompt, answer, True, optional)


@dataclass
class Prompts:
    """Distinct prompts in the order of their rows.

    rows: rows that were read. repeated: rows whose prompt came before. bad: rows that have none.
    """

    items: list[Prompt]
    rows: int
    repeated: int
    bad: Tally

    @property
    def digest(self) -> str:
        """sha256 hex of all of them in order, with where they came from and their rows."""
        lines = (json.dumps(each.facts, sort_keys=True) for each in self.items)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def read_prompts(config: DataConfig, section: SampleSection) -> Prompts:
    """The prompts of a section. config: how rows are read; its `train` names them.

    Raises:
        UserError: a bad row, unless data.on_bad_row=skip; no prompt at all.
    """
    bad, found, rows = BadRows(config.on_bad_row, config.row_bytes), {}, 0
    for where, raw in _rows(config, bad):
        rows += 1
        try:
            prompt = prompt_of(where, raw, config)
            found.setdefault(prompt.key, prompt)
        except BadRow as verdict:
            bad.reject(where, verdict)
        except Dropped as verdict:
            bad.add(where, verdict.kind, str(verdict))
        if config.max_rows is not None and rows >= config.max_rows:
            break
    repeated = rows - bad.total - len(found)
    prompts = _with_system(list(found.values()), section)
    if not prompts:
        reasons = "; ".join(f"{where}: {message}" for where, message in list(bad)[:3])
        raise UserError(f"sample.prompts={section.prompts}: no row has a prompt. {reasons}")
    return Prompts(_chosen(prompts, section), rows, repeated, bad)


def _rows(config: DataConfig, bad: BadRows) -> Iterator[tuple[str, dict[str, Any]]]:
    with shown("reading prompts", None) as advance:
        for part in parts_of(config, "train"):
            for where, raw in part.read(bad):
                advance(1)
                yield printable(where), raw


def prompt_of(where: str, raw: Mapping[str, Any], config: DataConfig) -> Prompt:
    """The prompt of one row, found as `train` would find it. Raises BadRow and Dropped."""
    if config.format == SFT:  # whose prompts end before the assistant's first turn
        config = config.model_copy(update={"format": "auto"})
    ours = {theirs: name for name, theirs in config.columns.items()}
    names = {ours.get(name, name): name for name, value in raw.items() if value is not None}
    parsed = _parsed(where, raw, names, config)
    keep_images(parsed, config, in_memory)
    images = parsed.optional.get(IMAGES) or []
    kept = {name: value for name, value in parsed.optional.items() if name in PROMPT_COLUMNS}
    apart = {*PROMPT_COLUMNS, *(IMAGE_COLUMNS if images else ())}
    beside = {name: raw[name] for name in raw if ours.get(name, name) not in apart}
    return Prompt(where, parsed.prompt, kept, _plain(beside, parsed.prompt), images)


def _parsed(where: str, raw: Mapping[str, Any], names: dict[str, str], config: DataConfig) -> Row:
    """The row as `train` reads it, or with other answers. names: of its columns, by ours."""
    found, untrained = None, False
    try:
        row = parse_row(where, raw, config)
        if row.kind != DEMONSTRATIONS:
            return row
    except (BadRow, Dropped) as verdict:
        found, untrained = verdict, isinstance(verdict, Dropped)
    if (untrained or {"response", "helpfulness"} <= names.keys()) and _has_prompt(raw, names):
        with suppress(BadRow, Dropped):
            return parse_row(where, _decided(raw, names), config)
    answered = names.keys() & {*ANSWERS, *CONVERSATIONS}
    refused = (untrained and "prompt" not in names) or (answered and names.keys() & {*JUDGED})
    if found is not None and refused:
        raise found
    try:
        return parse_row(where, _with_probe(raw, names, config), config)
    except BadRow as verdict:
        if verdict.fault == "missing field 'prompt'":
            values.need({}, raw, "prompt")  # which names no column that we have put there
        raise


def _has_prompt(raw: Mapping[str, Any], names: dict[str, str]) -> bool:
    """Whether other answers leave a row its prompt."""
    whole = "chosen" in names and isinstance(raw[names["chosen"]], list)
    return bool(names.keys() & {*BEFORE, *CONVERSATIONS}) or (
        whole and len(raw[names["chosen"]]) > 1
    )


def _decided(raw: Mapping[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """A row with answers of which none is preferred, as one with others, of which one is."""
    row = dict(raw) | {names[ours]: DECIDED[ours] for ours in DECIDED.keys() & names.keys()}
    if {"response", "helpfulness"} <= names.keys():  # one of several rows with a prompt
        row[names["response"]] = ["", ""]
    for number, ours in enumerate(name for name in (*ANSWERS, *CONVERSATIONS) if name in names):
        row[names[ours]] = _other(row[names[ours]], f"{PROBE} {number}")
    return row


def _other(value: Any, text: str) -> Any:
    """Another answer in the place of one, or of each of several. A conversation keeps what is before it."""
    if isinstance(value, str):
        return text
    if isinstance(value, list) and are_messages(value):
        last = dict(value[-1])
        said = str(last.get("role", last.get("from"))).lower() in ("assistant", "gpt")
        key = "content" if "content" in last else "value"
        return [*value[:-1], last | {key: text}] if said else value
    if isinstance(value, list):
        return [_other(each, f"{text}.{number}") for number, each in enumerate(value)]
    if isinstance(value, dict):
        keys = ("content", "value", "response", "answer", "completion")
        return value | {key: _other(value[key], text) for key in keys if key in value}
    return value


def _with_probe(
    raw: Mapping[str, Any], names: dict[str, str], config: DataConfig
) -> dict[str, Any]:
    """A row without its answers, and without what is told of them, as one with a single good answer."""
    known = [names[name] for name in (*ANSWERS, *JUDGED) if name in names]
    row = {name: value for name, value in raw.items() if name not in known}
    chats = any(_has_messages(raw[name]) for name in known)
    for ours in (name for name in CONVERSATIONS if name in names):
        if "prompt" not in names:
            answer = [say("assistant", PROBE)]
            row[names[ours]] = [*_before_answer(row[names[ours]], ours), *answer]
            return row | {config.columns.get("label", "label"): True}
        if _goes_on(raw[names["prompt"]], row[names[ours]]):
            del row[names[ours]]
    answer = [say("assistant", PROBE)] if chats else PROBE
    columns = {"completion": answer, "label": True}
    return row | {config.columns.get(name, name): value for name, value in columns.items()}


def _has_messages(value: Any) -> bool:
    """Whether answers are messages, or lists of them."""
    return isinstance(value, list) and (are_messages(value) or any(map(_has_messages, value)))


def _goes_on(prompt: Any, messages: Any) -> bool:
    """Whether a conversation is the prompt and what was answered to it."""
    prompt = [say("user", prompt)] if isinstance(prompt, str) else prompt
    return isinstance(messages, list) and messages[: len(prompt)] == prompt


def _before_answer(value: Any, name: str) -> Messages:
    """A conversation without the assistant's last messages. Raises BadRow."""
    value = messages_in(value) if isinstance(value, str) else value
    if not isinstance(value, (list, dict)):
        raise BadRow(
            f"field {name!r} is not a list", f"expected messages, got {type(value).__name__}"
        )
    messages = check_messages(value, name)
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages:
        raise BadRow(f"nothing before the answer in {name}", "expected a message of the user")
    return messages


def _plain(values: dict[str, Any], prompt: str | Messages) -> dict[str, Any]:
    """Columns that JSON can hold, but for those that only repeat the prompt. NaN and infinity are null."""
    kept = {}
    for name, value in values.items():
        if value is None or value == prompt:
            continue
        try:
            kept[name] = json.loads(json.dumps(value), parse_constant=lambda _: None)
        except (TypeError, ValueError):
            kept[name] = str(value)
    return kept


def _with_system(prompts: list[Prompt], section: SampleSection) -> list[Prompt]:
    """Chats that have no system message get that of the section."""
    if section.system_prompt is None:
        return prompts
    if prompts and not any(each.is_chat for each in prompts):
        raise UserError(
            f"sample.system_prompt={section.system_prompt!r:.80} is not used: all prompts are text, which "
            "has no messages; set data.apply_chat_template=true, or remove it"
        )
    system = say("system", section.system_prompt)

    def has_none(each: Prompt) -> bool:
        return each.is_chat and not (
            each.prompt and each.prompt[0]["role"] in ("system", "developer")
        )

    return [
        replace(each, prompt=[system, *each.prompt]) if has_none(each) else each for each in prompts
    ]


def _chosen(prompts: list[Prompt], section: SampleSection) -> list[Prompt]:
    if section.max_prompts is None or section.max_prompts >= len(prompts):
        return prompts
    order = np.random.default_rng(section.seed).permutation(len(prompts))[: section.max_prompts]
    return [prompts[place] for place in sorted(order)]
