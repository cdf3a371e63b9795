"""The command line of a trainer, by itself or in a shell script."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field
from typing import Any

import yaml

from dpo_fast import bounded_yaml
from dpo_fast.errors import UserError
from dpo_fast.migration.script import expand, only_sets, set_by, statements, unknown
from dpo_fast.wording import quoted

WORDS = re.compile(r"\"(\$\{\w+\[[@*]\]\})\"")  # an array, whose words are words of the command
ECHO = re.compile(r"^\s*(?:echo|printf)\b")
DEVICES = re.compile(r"CUDA_VISIBLE_DEVICES=[\"']?([\d,]+)")
LOCAL = re.compile(r"--include[= ]\S*?localhost:([\d,]+)")
COUNTED = re.compile(
    r"--(?P<of>nproc[-_]per[-_]node|num_processes|num-processes|num_gpus)[= ](?P<count>\d+)"
    r"|\b(?P<env>NPROC_PER_NODE)=[\"']?(?P<set>\d+)"
)
MACHINES = re.compile(r"(?:--nnodes|--num_nodes|\bNNODES)(?:=[\"']?| )(\d+)(?![\d:])")
ACCELERATE = re.compile(
    r"accelerate launch\b.*?--config[_-]file[= ]\s*((?:\$\([^)]*\)+|\S)+)", re.S
)
# A word at which the shell ends a command, or leads its output elsewhere.
ENDS = re.compile(r"[;&|]+|\d?>{1,2}(?:&\d)?.*|&>{1,2}.*|<{1,3}|.*;", re.S)
FLAG = re.compile(r"--([A-Za-z][\w.-]*)(?:=(.*))?$", re.S)


@dataclass
class Command:
    """A command that starts a trainer.

    options: by name, as they are written; a flag without a value is True.
    start: what starts the trainer, as `trl` or `kto.py`.
    words: what stands between the trainer and its first option, as `dpo` in `trl dpo`.
    accelerate: the file of `accelerate launch --config_file`.
    ranks: processes that it is started with, as far as it says so.
    unread: options, and words between them, whose values are not known, and why.
    line: of the script, where it begins.
    """

    options: dict[str, Any] = field(default_factory=dict)
    words: list[str] = field(default_factory=list)
    start: str = ""
    accelerate: str | None = None
    ranks: int | None = None
    unread: dict[str, str] = field(default_factory=dict)
    line: int = 0


def is_command(text: str, marks: tuple[str, ...]) -> bool:
    """Whether a text starts a trainer. marks: regular expressions of what starts it."""
    return any(re.search(mark, each.text) for each in statements(text) for mark in marks)


def read_commands(text: str, marks: tuple[str, ...], place: str) -> list[Command]:
    """The commands of a script that start a trainer.

    Raises:
        UserError: there is none, or quotes are open.
    """
    found: list[Command] = []
    script = [each for each in statements(text) if not ECHO.match(each.text)]
    whole = expand("\n".join(each.text for each in script), set_by(script))
    known: dict[str, str] = {}
    for statement in script:
        if only_sets(statement):
            known = set_by([statement], known)
            continue
        line = expand(WORDS.sub(r"\1", statement.text), known)
        match = next((each for each in (re.search(mark, line) for mark in marks) if each), None)
        if match is None:
            continue
        try:
            words = shlex.split(_within(line, match.end()), comments=True)
        except ValueError as error:
            told = f"the command of line {statement.line} breaks off ({error})"
            raise UserError(f"{place}: {told}") from None
        command = Command(start=match[0].strip(), ranks=_ranks(whole, line), line=statement.line)
        if launched := ACCELERATE.search(line[: match.start()]):
            command.accelerate = launched[1].strip("\"'")
        _read_words(command, words)
        found.append(command)
    if not found:
        raise UserError(f"{place}: no line starts the trainer")
    return found


def _within(line: str, start: int) -> str:
    """The rest of a line; where it stands in quotes, as behind `bash -c`, up to their end."""
    rest = line[start:]
    for quote in "\"'":
        if line[:start].count(quote) % 2:
            rest = rest.partition(quote)[0]
    return rest


def _read_words(command: Command, words: list[str]) -> None:
    end = next((index for index, word in enumerate(words) if ENDS.fullmatch(word)), len(words))
    last = words[end][:-1] if end < len(words) and words[end].endswith(";") else ""
    words, index = words[:end] + [last] * bool(last), 0
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
        _set(command, match[1].replace("-", "_"), values)


UNSET = "which neither the script nor the environment sets: write {}"


def _set(command: Command, name: str, values: list[str]) -> None:
    """An option with its values. Words behind the first that are variables alone are no values."""
    for word in values[1:]:
        if unknown(word) == word:
            values.remove(word)
            command.unread[word] = f"stands in the command, {UNSET.format('what it holds')}"
    odd = next((found for found in map(unknown, values) if found), None)
    if odd is not None:
        shown = " ".join(values)
        told = f"is {shown}" if shown == odd else f"is {quoted(shown)}, with {odd}"
        command.unread[name] = f"{told}, {UNSET.format('its value')}"
    else:
        _put(command.options, name, values)


def _put(options: dict[str, Any], name: str, values: list[str]) -> None:
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
