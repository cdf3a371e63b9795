"""Where a run of another trainer is told: loggers with their projects and runs, and the hub."""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Any

from dpo_fast.migration.draft import Draft
from dpo_fast.migration.option import flag, listed
from dpo_fast.training.log_section import OTHER_NAMES, LogSection

EVERY_SAVE = "every_save"  # transformers' default
HUB = ("hub_model_id", "hub_private_repo", "hub_revision", "hub_strategy")
OLD_HUB = ("push_to_hub_model_id", "push_to_hub_organization")


def put_hub(draft: Draft) -> None:
    """The options of a push by transformers' names."""
    given = [name for name in (*HUB, *OLD_HUB) if draft.has(name)]
    if not flag(draft["push_to_hub"]):
        for name in given:
            draft.spare(name, "push_to_hub is not set")
        return
    draft.put("train.push_to_hub", True, "push_to_hub")
    repository, names = _repository(draft)
    if repository is not None:
        draft.put("train.hub_model_id", repository, *names)
    if draft["hub_private_repo"] is not None:
        draft.put("train.hub_private_repo", flag(draft["hub_private_repo"]), "hub_private_repo")
    if draft["hub_revision"] is not None:
        draft.put("train.hub_revision", str(draft["hub_revision"]), "hub_revision")
    draft.put("train.hub_strategy", str(draft["hub_strategy"]), "hub_strategy")


def _repository(draft: Draft) -> tuple[str | None, list[str]]:
    """The repository, and the options that name it. Older versions have its owner apart."""
    if draft.has("hub_model_id"):
        return str(draft["hub_model_id"]), ["hub_model_id"]
    names = [name for name in OLD_HUB if draft.has(name)]
    if not names:
        return None, []
    own = draft["push_to_hub_model_id"] or Path(str(draft["output_dir"])).name
    owner = draft["push_to_hub_organization"]
    return (f"{owner}/{own}" if owner else str(own)), names


def put_loggers(draft: Draft) -> None:
    """The loggers by transformers' names, and the project of trackio, which alone has one there."""
    names = [str(each).lower() for each in listed(draft["report_to"])]
    reports(draft, "report_to", [name for name in names if name not in ("none", "all")])
    if "all" in names:
        draft.lose("report_to", f"name them: {', '.join(known_loggers())}")
    if not draft.has("project"):
        return
    if "trackio" in names:
        draft.put("log.project", str(draft["project"]), "project")
    else:
        draft.spare("project", "it is trackio's, which is not in report_to")


def reports(draft: Draft, name: str, loggers: list[str]) -> None:
    """The loggers that we have, and a word about the others."""
    known, loggers = known_loggers(), [OTHER_NAMES.get(each, each) for each in loggers]
    if missing := [each for each in loggers if each not in known]:
        draft.lose(
            name, f"{', '.join(missing)}: a run reports to {', '.join(known)} and metrics.jsonl"
        )
    if here := [each for each in loggers if each in known]:
        draft.put("log.report_to", here, name)


def put_of_loggers(draft: Draft, key: str, owners: dict[str, str]) -> None:
    """A key of the section log that several loggers name apart: the first of those that report.

    owners: the logger of each option.
    """
    entry = draft.keys.get("log.report_to")
    reporting = [] if entry is None else entry.value
    first: str | None = None
    for name, logger in owners.items():
        if not draft.has(name):
            continue
        if logger not in reporting:
            draft.spare(name, f"nothing is reported to {logger}")
        elif first is None or str(draft[name]) == str(draft[first]):
            first = first or name
            draft.put(key, str(draft[name]), *([name] if first == name else [first, name]))
        else:
            draft.lose(name, f"{key} is one for all loggers, and {first} has set it")


def known_loggers() -> list[str]:
    """Names that log.report_to takes."""
    names, waiting = [], [LogSection.model_fields["report_to"].annotation]
    while waiting:
        kind: Any = waiting.pop()
        inner = typing.get_args(kind)
        names += [each for each in inner if isinstance(each, str)]
        waiting += [each for each in inner if not isinstance(each, str)]
    return names
