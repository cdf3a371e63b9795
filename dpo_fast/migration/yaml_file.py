"""A draft as the text of a file: our YAML, with a comment beside each key and what was left out above."""

from __future__ import annotations

import json
import textwrap
from typing import Any

from dpo_fast import bounded_yaml
from dpo_fast.migration.draft import LOST, Draft, Entry, place
from dpo_fast.rounds.config import RoundsConfig
from dpo_fast.training.config_file import SECTIONS
from dpo_fast.wording import printable

WIDTH = 100


def text_of(draft: Draft, out: str) -> str:
    """The file. out: its name, for the commands in its head."""
    lines = _head(draft, out)
    for section in RoundsConfig.model_fields if draft.rounds else SECTIONS:
        own = {k: entry for k, entry in draft.keys.items() if k.split(".")[0] == section}
        if section in own:
            lines += _line(section, own[section], "")
        elif own:
            lines += [f"{section}:", *_keys(own)]
    return "\n".join(lines) + "\n"


def _head(draft: Draft, out: str) -> list[str]:
    lines = [
        f"Made by `dpo-fast import` of {draft.place}, a file of {draft.trainer}. A comment "
        f"names the option "
        "that a value comes from, or says that it is a default there.",
        *(f"  {line}" for line in _commands(draft, out)),
    ]
    lost = [fate for fate in draft.fates if fate.what == LOST]
    lines += ["Without a counterpart:"] if lost else []
    lines += [f"- {fate.shown}: {fate.why}" for fate in lost]
    lines += ["To know:"] if draft.notes else []
    lines += [f"- {note}" for note in draft.notes]
    return [each for line in lines for each in _comment(line)]


def _commands(draft: Draft, out: str) -> list[str]:
    if draft.rounds:
        return [
            f"dpo-fast iterate {out} --dry-run   checks all rounds and their data",
            f"dpo-fast iterate {out} --status    shows the rounds, and what is done",
        ]
    return [
        f"dpo-fast data {out}              shows the examples, what is cut and what is left out",
        f"dpo-fast train {out} --dry-run   does all that comes before the first step",
    ]


def _comment(text: str) -> list[str]:
    indent = "  " if text.startswith("- ") else ""
    if text.startswith("  "):
        return [f"#{text}"]
    text = " ".join(printable(text).split())
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent="# ",
        subsequent_indent=f"# {indent}",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _keys(entries: dict[str, Entry]) -> list[str]:
    """The keys of a section, those of a section within it together."""
    lines: list[str] = []
    opened: set[str] = set()
    for key in sorted(entries, key=place):
        _, *inner, last = key.split(".")
        if inner and inner[0] not in opened:
            opened.add(inner[0])
            lines.append(f"  {inner[0]}:")
        lines += _line(last, entries[key], "  " * (1 + len(inner)))
    return lines


def _line(key: str, entry: Entry, indent: str) -> list[str]:
    comment = " ".join(printable(entry.comment).split())
    if isinstance(entry.value, (list, dict)) and entry.value and not _flat(entry.value):
        made = bounded_yaml.dump(
            {key: entry.value}, sort_keys=False, allow_unicode=True, width=float("inf")
        )
        lines = [f"{indent}{line}" for line in made.splitlines()]
        return [f"{lines[0]} # {comment}" if comment else lines[0], *lines[1:]]
    shown = f"{indent}{key}: {_scalar(entry.value)}"
    return [f"{shown} # {comment}" if comment else shown]


def _flat(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, (str, int, float)) for each in value)


def _scalar(value: Any) -> str:
    if _flat(value):
        return f"[{', '.join(map(_scalar, value))}]"
    if isinstance(value, str) and any(mark in value for mark in ",[]{}"):
        return json.dumps(value, ensure_ascii=False)
    made = bounded_yaml.dump(value, allow_unicode=True, width=float("inf"), default_flow_style=True)
    return made.splitlines()[0]
