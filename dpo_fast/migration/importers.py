"""The trainers whose files we read, and the way from such a file to a configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_fast.errors import UserError
from dpo_fast.migration import axolotl, llamafactory, openrlhf, trl
from dpo_fast.migration.draft import LOST, Draft
from dpo_fast.migration.files import beside, read_mapping, read_text
from dpo_fast.migration.launcher import put_accelerate, ranks_of
from dpo_fast.migration.option import Table
from dpo_fast.migration.script import unknown
from dpo_fast.migration.settle import settle
from dpo_fast.migration.shell import Command, is_command, read_commands
from dpo_fast.rounds.config import RoundsConfig
from dpo_fast.rounds.plan import Plan
from dpo_fast.training.config import build, build_config


@dataclass(frozen=True)
class Importer:
    """One trainer.

    title: its name. tables: its options, by the name of one of its methods.
    method: which of them a file is for, from the options, the one that is asked for and the file's name.
    names: those that a file has in place of a method's table, by the latter.
    renamed: whether those of the table are what options were called before, and are read as well.
    finish: puts what is read together.
    marks: what starts it on a command line, as regular expressions.
    started: the method that a command line is for, from what starts it and the words behind it.
    config: option that names a YAML file on a command line; empty where it is the first word.
    """

    title: str
    tables: dict[str, Table]
    method: Callable[[dict[str, Any], str | None, str], str]
    finish: Callable[[Draft, str], None]
    marks: tuple[str, ...]
    started: Callable[[str, list[str]], str | None] = lambda start, words: None
    config: str = ""
    names: Callable[[str], dict[str, str]] = lambda method: {}
    renamed: bool = False


IMPORTERS = {
    "trl": Importer(
        "TRL",
        trl.TABLES,
        trl.trainer_of,
        trl.finish,
        (
            r"\btrl (?=\w+)",
            r"\b\w*(?:dpo|kto|cpo|orpo|grpo|sft)\w*\.py\b",
            r"-m [\w.]*(?:dpo|kto|grpo|sft)\b",
        ),
        trl.started,
        "config",
    ),
    "llamafactory": Importer(
        "LLaMA-Factory",
        llamafactory.TABLES,
        llamafactory.stage_of,
        llamafactory.finish,
        (
            r"\b(?:llamafactory-cli|llamafactory\.cli|lmf)\s+train\b",
            r"\bsrc/train(?:_bash)?\.py\b",
            r"\bllamafactory/launcher\.py\b",
        ),
    ),
    "openrlhf": Importer(
        "OpenRLHF",
        openrlhf.TABLES,
        openrlhf.method_of,
        openrlhf.finish,
        (
            r"\bopenrlhf\.cli\.train_\w+",
            r"\bopenrlhf/cli/train_\w+\.py",
            r"\btrain_(?:dpo|sft|kto|rm|ppo|ppo_ray)\.py\b",
        ),
        openrlhf.started,
        "config",
        openrlhf.names_of,
        renamed=True,
    ),
    "axolotl": Importer(
        "Axolotl",
        axolotl.TABLES,
        axolotl.method_of,
        axolotl.finish,
        (r"\baxolotl\s+train\b", r"\baxolotl\.cli\.train\b", r"\bscripts/finetune\.py\b"),
        names=axolotl.names_of,
    ),
}


def import_file(
    kind: str,
    file: Path,
    method: str | None = None,
    accelerate: Path | None = None,
    ranks: int | None = None,
) -> Draft:
    """Our configuration of another trainer's file, as a draft.

    kind: a key of `IMPORTERS`. method: one of its tables; None: what the file says.
    accelerate: a configuration of accelerate that it is started with.
    ranks: processes that it is started with, where the file does not say so.

    Raises:
        UserError: the file cannot be read, or is for something that is not done here.
    """
    if kind not in IMPORTERS:
        raise UserError(f"{kind}: choose from {', '.join(IMPORTERS)}")
    importer = IMPORTERS[kind]
    command = _read(importer, file, method)
    asked = method or _started(importer, command)
    chosen = importer.method(command.options, asked, str(file))
    launched, launcher = _launched(command, accelerate, file)
    ranks = ranks or command.ranks or ranks_of(command.options) or ranks_of(launched)
    written = importer.names(chosen)
    back = {theirs: name for name, theirs in written.items()}
    if not set(back) & {*command.options, *command.unread}:
        written = {}
    draft = Draft(
        importer.title,
        importer.tables[chosen],
        {back.get(name, name): value for name, value in command.options.items()},
        str(file),
        ranks,
        written,
        {back.get(name, name): why for name, why in command.unread.items()},
    )
    draft.read_table()
    for option in LAUNCHING:
        if option in draft.given and option not in draft.options:
            draft.spare(option, "of the launcher: --nproc, torchrun or srun start ours")
    if launched:
        put_accelerate(draft, launched, launcher.name, launcher)
    try:
        importer.finish(draft, chosen)
    except UserError:
        raise
    except (ValueError, TypeError) as error:  # a number, a list or a mapping that is none
        if draft.read is None:
            raise
        raise draft.fault(draft.read, f"not a value of this option ({error})") from None
    settle(draft)
    return draft


# Options of the launcher, which TRL's and Axolotl's commands take as well.
LAUNCHING = (
    *("accelerate_config", "num_processes", "num_machines", "machine_rank", "launcher"),
    *("main_process_ip", "main_process_port", "mixed_precision", "nproc_per_node", "nnodes"),
)
# Configurations that TRL brings by name. Each is of 8 processes, where nothing else is said.
BY_NAME: dict[str, dict[str, Any]] = {
    "single_gpu": {"num_processes": 1},
    "multi_gpu": {"distributed_type": "MULTI_GPU", "num_processes": 8},
    **dict.fromkeys(("fsdp1", "fsdp2"), {"distributed_type": "FSDP", "num_processes": 8}),
    **{
        f"zero{stage}": {
            "distributed_type": "DEEPSPEED",
            "deepspeed_config": {"zero_stage": stage},
            "num_processes": 8,
        }
        for stage in (1, 2, 3)
    },
}


def _launched(command: Command, accelerate: Path | None, file: Path) -> tuple[dict[str, Any], Path]:
    """The configuration of accelerate, and its file: asked for, of the launcher, or of TRL's option.

    One that the file names and that is not here is noted as unread.
    """
    named, option = command.accelerate, "--config_file"
    if named is None:
        named, option = command.options.get("accelerate_config"), "accelerate_config"
    if accelerate is not None:
        return read_mapping(accelerate), accelerate
    if named is None:
        return {}, file
    if named in BY_NAME and not Path(named).is_file():
        return BY_NAME[named], Path(named)
    if unset := unknown(str(named)):
        command.unread[option] = f"is {named}, with {unset}, which is not known. {LAUNCH}"
        return {}, file
    try:
        found = beside(str(named), file, "configuration of accelerate", option)
        return read_mapping(found), found
    except UserError as error:
        told = str(error).removeprefix(f"{file}: {option}={named}: ")
        command.options.pop(option, None)
        command.unread[option] = f"is {named}: {told.partition('; ')[0]}. {LAUNCH}"
        return {}, file


# What is said where the file of accelerate cannot be read.
LAUNCH = "Name it with --accelerate, or give --nproc and set parallel.zero_stage"


def check(draft: Draft) -> str | None:
    """Why our configuration would be refused; None if it would not."""
    try:
        if draft.rounds:
            Plan(build(RoundsConfig, draft.tree(), "the configuration"), "the configuration")
        else:
            build_config(draft.tree(), "the configuration")
    except UserError as error:
        return str(error)
    return None


def lost(draft: Draft) -> list[str]:
    """Names of the options that have no counterpart."""
    return [fate.name for fate in draft.fates if fate.what == LOST]


def _read(importer: Importer, file: Path, method: str | None) -> Command:
    """The options of a file: of a YAML or JSON file, or of the command in a shell script."""
    if file.suffix.lower() in (".yaml", ".yml", ".json"):
        return Command(read_mapping(file))
    text = read_text(file)
    if not is_command(text, importer.marks):
        if file.suffix.lower() in (".sh", ".bash", ".slurm", ".sbatch", ".txt", ".bat", ".ps1"):
            raise UserError(
                f"{file}: no line starts {importer.title}; name the file with its options, YAML or JSON"
            )
        return Command(read_mapping(file))
    command = _chosen(importer, read_commands(text, importer.marks, str(file)), method, file)
    name = command.options.pop(importer.config, None) if importer.config else None
    if name is None:
        yamls = [word for word in command.words if word.endswith((".yaml", ".yml", ".json"))]
        yamls = yamls or [word for word in command.words if unknown(word)]
        name = yamls[0] if yamls else None
    if name is None and importer.config in command.unread:
        raise UserError(f"{file}: {importer.config} {command.unread[importer.config]}")
    if name is not None and (unset := unknown(str(name))):
        raise UserError(
            f"{file}: its options stand in {name}, and neither the script nor the environment sets "
            f"{unset}: import that file, or write its name"
        )
    if name is not None:
        named = beside(str(name), file, "configuration", importer.config or "its file")
        overrides = dict(word.split("=", 1) for word in command.words if "=" in word)
        command.options = read_mapping(named) | overrides | command.options
    return command


def _chosen(importer: Importer, found: list[Command], method: str | None, file: Path) -> Command:
    """The one command of a script, or that of the method that is asked for."""
    of_method = [each for each in found if method in (None, _started(importer, each))]
    if len(of_method) == 1:
        return of_method[0]
    if len(found) == 1:
        return found[0]
    told = ", ".join(
        f"line {each.line} ({_started(importer, each) or each.start})" for each in found
    )
    raise UserError(
        f"{file}: {len(found)} commands start {importer.title}: {told}. Choose with --method where it "
        "tells them apart, or import a script with one of them"
    )


def _started(importer: Importer, command: Command) -> str | None:
    """The method that a command is for, where what starts it says so."""
    return importer.started(command.start, command.words) if command.start else None
