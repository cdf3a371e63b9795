"""The prompts of a round: read from rows of any form that `train` reads, and from rows without answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from dpo_fast.data.config import DataConfig
from dpo_fast.data.forms.conversations import CONVERSATIONS
from dpo_fast.data.messages import Messages, are_messages, check_messages, messages_in, say
from dpo_fast.data.parts import parts_of
from dpo_fast.data.rows import CompletionRow, parse_row
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
PROMPT_COLUMNS = ("prompt", "system", "tools", "chat_template_kwargs")


@dataclass(frozen=True)
class Prompt:
    """What completions follow.

    where: file and line. prompt: text, or messages. optional: `tools` and `chat_template_kwargs`.
    row: the other columns of its row, for judges.
    """

    where: str
    prompt: str | Messages
    optional: dict[str, Any] = field(default_factory=dict)
    row: dict[str, Any] = field(default_factory=dict)

    @property
    def is_chat(self) -> bool:
        return not isinstance(self.prompt, str)

    @property
    def key(self) -> str:
        """The same for prompts that a model cannot tell apart."""
        return json.dumps([self.prompt, self.optional], sort_keys=True)

    def answered(self, completion: str) -> CompletionRow:
        """A row with a completion, as `train` would tokenise it."""
        answer = [say("assistant", completion)] if self.is_chat else completion
        return CompletionRow(self.where, self.prompt, answer, True, self.optional)


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
        lines = (json.dumps(vars(each), sort_keys=True) for each in self.items)
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
    row, ours = dict(raw), {theirs: name for name, theirs in config.columns.items()}
    names = {ours.get(name, name) for name, value in raw.items() if value is not None}
    talk = next((name for name in CONVERSATIONS if name in names and "prompt" not in names), None)
    if talk is not None and not names & {*ANSWERS, *JUDGED}:
        theirs = config.columns.get(talk, talk)
        row[theirs] = [*_before_answer(row[theirs], talk), say("assistant", PROBE)]
        row[config.columns.get("label", "label")] = True
    elif not names & set(JUDGED):
        row = _answered(row, names, config)
    try:
        parsed = parse_row(where, row, config)
    except Dropped:  # its answers are equal, or empty, which does not matter here
        if "prompt" not in names:
            raise
        parsed = parse_row(where, _answered(row, {"completions"}, config), config)
    kept = {name: value for name, value in parsed.optional.items() if name in PROMPT_COLUMNS}
    beside = {name: raw[name] for name in raw if ours.get(name, name) not in PROMPT_COLUMNS}
    return Prompt(where, parsed.prompt, kept, _plain(beside, parsed.prompt))


def _answered(row: dict[str, Any], names: set[str], config: DataConfig) -> dict[str, Any]:
    """A row without a verdict on its answers as one with a label, and an answer where it has none."""
    if names & {"completions"}:  # samples that nobody has judged, or answers that are the same
        known = {*ANSWERS, *JUDGED}
        theirs = {config.columns.get(name, name) for name in known}
        chats = any(
            isinstance(row[name], list) and are_messages(row[name]) for name in theirs & set(row)
        )
        row = {name: value for name, value in row.items() if name not in theirs}
        row[config.columns.get("completion", "completion")] = (
            [say("assistant", PROBE)] if chats else PROBE
        )
    elif not names & set(ANSWERS) or names & {"answers"}:
        row[config.columns.get("completion", "completion")] = PROBE
    return row | {config.columns.get("label", "label"): True}


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
    """Columns that JSON can hold, but for those that only repeat the prompt."""
    kept = {}
    for name, value in values.items():
        if value is None or value == prompt:
            continue
        try:
            kept[name] = json.loads(json.dumps(value, allow_nan=False))
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
