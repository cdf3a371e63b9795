"""Commands whose options are few, and a run's are not among them: those are key=value."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence

from typer.core import TyperGroup

from dpo_fast.training.config_file import SECTIONS

OF_ROUNDS = ("sample", "judge", "pairs")  # sections of the file that three commands share
ROUNDS = {"sample": OF_ROUNDS[:1], "judge": OF_ROUNDS[1:], "iterate": OF_ROUNDS}


class Commands(TyperGroup):
    """A group that tells how an option of a run is written, where someone writes it with dashes."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except Exception as error:
            # By its name: typer's click is the package of that name, or its own.
            named = type(error).__name__ == "NoSuchOption" and _takes_keys(error.ctx)
            if named and (hint := meant(error.option_name, sys.argv[1:], error.ctx.info_name)):
                error.message, error.possibilities = f"{error.message}. {hint}", None
            raise


def _takes_keys(ctx) -> bool:
    """Whether a command takes key=value."""
    return ctx is not None and any(each.name == "overrides" for each in ctx.command.params)


def meant(option: str, words: Sequence[str], command: str = "train") -> str | None:
    """What a run's option is called that was written as `option`; None if it is none.

    words: of the command line.
    """
    name = option.lstrip("-").replace("-", "_")
    section, _, rest = name.partition(".")
    keys: dict[str, list[str]] = {}
    for key in _keys(command):
        keys.setdefault(key.rpartition(".")[2], []).append(key)
    if rest and section in (*SECTIONS, *OF_ROUNDS):
        found = [name]
    else:
        near = difflib.get_close_matches(name, keys, 1, 0.85)
        found = keys[name] if name in keys else keys[near[0]] if near else []
    if not found:
        return None
    value = _value(option, words) or "VALUE"
    written = " or ".join(f"{key}={value}" for key in found)
    return f"Options of a run have no dashes: {written}"


def _keys(command: str) -> list[str]:
    """The keys of a command's file, as they are written."""
    from dpo_fast.training.config import RunConfig

    sections = {name: field.annotation for name, field in RunConfig.model_fields.items()}
    if command not in ROUNDS:
        return [f"{name}.{key}" for name in sections for key in sections[name].model_fields]
    from dpo_fast.generation.config import SampleSection
    from dpo_fast.judging.config import JudgeSection, PairsSection

    kinds = dict(zip(OF_ROUNDS, (SampleSection, JudgeSection, PairsSection)))
    own = {name: kinds[name] for name in ROUNDS[command]}
    sections = own | (sections if command == "iterate" else {"model": sections["model"]})
    keys = [f"{name}.{key}" for name in sections for key in sections[name].model_fields]
    return ["output_dir", *(key for key in keys if key != "train.output_dir")]


def _value(option: str, words: Sequence[str]) -> str | None:
    """What stands behind an option, as `--name=value` or as the next word."""
    for index, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name == option and equals:
            return value
        if word == option and index + 1 < len(words) and not words[index + 1].startswith("--"):
            return words[index + 1]
    return None
