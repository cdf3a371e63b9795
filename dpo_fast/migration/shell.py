"""The command line of a trainer, by itself or in a shell script."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field
from typing import Any

import yaml

from dpo_fast import bounded_yaml
from dpo_fast.errors import UserError
from dpo_fast.wording import quoted

ASSIGNED = re.compile(r"^\s*(?:export\s+)?([A-Za-z_]\w*)=(\S+|\"[^\"]*\"|'[^']*')\s*$")
ECHO = re.compile(r"^\s*(?:echo|printf)\b")
VARIABLE = re.compile(r"\$\{?([A-Za-z_]\w*)\}?")
DEVICES = re.compile(r"CUDA_VISIBLE_DEVICES=[\"']?([\d,]+)")
LOCAL = re.compile(r"--include[= ]\S*?localhost:([\d,]+)")
COUNTED = re.compile(
    r"--(?P<of>nproc[-_]per[-_]node|num_processes|num-processes|num_gpus)[= ](?P<count>\d+)"
    r"|\b(?P<env>NPROC_PER_NODE)=[\"']?(?P<set>\d+)"
)
MACHINES = re.compile(r"(?:--nnodes|--num_nodes|\bNNODES)(?:=[\"']?| )(\d+)(?![\d:])")
ACCELERATE = re.compile(r"accelerate launch\b.*?--config_file[= ](\S+)")
ENDS = (";", "&&", "||", "|", "&", ">", ">>", "2>&1")  # of a command, as words
FLAG = re.compile(r"--([A-Za-z][\w.-]*)(?:=(.*))?$", re.S)


@dataclass
class Command:
    """A command that starts a trainer.

    options: by name, as they are written; a flag without a value is True.
    start: what starts the trainer, as `trl` or `kto.py`.
    words: what stands between the trainer and its first option, as `dpo` in `trl dpo`.
    accelerate: the file of `accelerate launch --config_file`.
    """

    options: dict[str, Any] = field(default_factory=dict)
    words: list[str] = field(default_factory=list)
    start: str = ""
    accelerate: str | None = None
    ranks: int | None = None


def is_command(text: str, marks: tuple[str, ...]) -> bool:
    """Whether a text starts a trainer. marks: regular expressions of what starts it."""
    return any(re.search(mark, _joined(text)) for mark in marks)


def read_command(text: str, marks: tuple[str, ...], place: str) -> Command:
    """The first command of a script that starts a trainer.

    Raises:
        UserError: there is none, there are several, or quotes are open.
    """
    lines = [line for line in _joined(text).splitlines() if not line.lstrip().startswith("#")]
    known = _assigned(lines)
    lines = [line for line in lines if not ASSIGNED.match(line) and not ECHO.match(line)]
    lines = [VARIABLE.sub(lambda m: known.get(m[1], m[0]), line) for line in lines]
    found = [line for line in lines if any(re.search(mark, line) for mark in marks)]
    if not found:
        raise UserError(f"{place}: no line starts the trainer")
    if len(found) > 1:
        raise UserError(
            f"{place}: {len(found)} lines start a trainer; import a script with one of them"
        )
    line = found[0]
    match = next(each for each in (re.search(mark, line) for mark in marks) if each)
    try:
        words = shlex.split(line[match.end() :], comments=True)
    except ValueError as error:
        raise UserError(f"{place}: the command breaks off ({error})") from None
    command = Command(start=match[0].strip(), ranks=_ranks(text, line))
    if launched := ACCELERATE.search(line):
        command.accelerate = launched[1]
    _read_words(command, words)
    for name, value in command.options.items():
        if isinstance(value, str) and (open_ := VARIABLE.search(value)):
            raise UserError(
                f"{place}: --{name} {quoted(value)} holds the variable {open_[0]}, which the script does "
                "not set; write its value"
            )
    return command


def _read_words(command: Command, words: list[str]) -> None:
    end = next((index for index, word in enumerate(words) if word in ENDS), len(words))
    words, index = words[:end], 0
    while index < len(words):
        match = FLAG.match(words[index])
        index += 1
        if match is None:
            command.words.append(words[index - 1])
            continue
        values = [match[2]] if match[2] is not None else []
        while match[2] is None and index < len(words) and not FLAG.match(words[index]):
            values.append(words[index])
            index += 1
        _set(command.options, match[1].replace("-", "_"), values)


def _set(options: dict[str, Any], name: str, values: list[str]) -> None:
    if values:
        options[name] = _value(values[0]) if len(values) == 1 else [_value(each) for each in values]
    elif name.startswith("no_") and name != "no_cuda":
        options[name.removeprefix("no_")] = False
    else:
        options[name] = True


def _value(text: str) -> Any:
    """A word as YAML has it, without lists that have no brackets."""
    try:
        value = bounded_yaml.load(text)
    except yaml.YAMLError:
        return text
    plain = isinstance(value, (bool, int, float)) or text[:1] in "[{" or value is None
    return value if plain and not isinstance(value, str) else text


def _joined(text: str) -> str:
    return re.sub(r"\\[ \t]*\r?\n", " ", text)


def _assigned(lines: list[str]) -> dict[str, str]:
    known: dict[str, str] = {}
    for line in lines:
        if match := ASSIGNED.match(line):
            value = match[2].strip("\"'")
            known[match[1]] = VARIABLE.sub(lambda m: known.get(m[1], m[0]), value)
    return known


def _ranks(text: str, line: str) -> int | None:
    """Processes that a command starts, as far as it says so."""
    several = MACHINES.search(line) or MACHINES.search(text)
    machines = int(several[1]) if several else 1
    if counted := COUNTED.search(line) or COUNTED.search(text):
        whole = (counted["of"] or "").endswith(
            "processes"
        )  # accelerate counts those of all machines
        return int(counted["count"] or counted["set"]) * (1 if whole else machines)
    if devices := LOCAL.search(line) or LOCAL.search(text) or DEVICES.search(text):
        return len([each for each in devices[1].split(",") if each]) * machines
    return None
