"""A shell script as far as an import needs it: its statements, and the variables that they set.

Nothing of it is run. What only a program or an argument of the script would say stays as it is written.
"""

from __future__ import annotations

import ast
import operator
import os
import re
from dataclasses import dataclass

# An end of line that a command goes on behind: of a shell, of PowerShell and of Windows' cmd.
GOES_ON = re.compile(r"(?:\\|(?<=\s)[`^])[ \t]*\n")
NAMED = re.compile(r"\s*(?:(?:export|local|declare|readonly)\s+(?:-\w+\s+)*)?([A-Za-z_]\w*)(\+?)=")
COMMENT = re.compile(r"(?:^|\s)#.*$", re.M)
# $NAME, ${NAME}, ${NAMES[@]} and ${NAME:-other}; $((2 * 4)).
VARIABLE = re.compile(r"\$(?:\{([A-Za-z_]\w*)(?:\[[@*]\])?(?::?[-=]([^{}]*))?\}|([A-Za-z_]\w*))")
RECKONED = re.compile(r"\$\(\(([^()]*)\)\)")
UNKNOWN = re.compile(r"\$\((?:[^()]|\([^()]*\))*\)|\$[\w{(@*?#][^\s\"']*|`[^`]*`")
CLOSING = {"(": ")", "{": "}", "`": "`", '"': '"', "'": "'"}
LONGEST = 100_000  # characters of a statement
OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.floordiv,
}


@dataclass(frozen=True)
class Statement:
    """A line of a script with those that it goes on in. line: the number of the first one."""

    text: str
    line: int


def statements(text: str) -> list[Statement]:
    """The statements of a script, without comments. The lines of a here-document are statements, too."""
    text = text.replace("\r\n", "\n").replace("\0", "")
    found: list[Statement] = []
    number, start, held = 1, 1, ""
    for line in GOES_ON.sub(" \0", text).split("\n"):
        start = start if held else number
        number += 1 + line.count("\0")
        line = line.replace("\0", "")
        if not held and line.lstrip().startswith("#"):
            continue
        held = f"{held}\n{line}" if held else line
        if len(held) > LONGEST or not _goes_on(held):
            found.append(Statement(held, start))
            held = ""
    return [*found, Statement(held, start)] if held else found


def set_by(found: list[Statement], before: dict[str, str] | None = None) -> dict[str, str]:
    """The variables that statements set, as they are behind the last one. before: those that are set."""
    known = dict(before or {})
    for statement in filter(only_sets, found):
        for name, added, value in _assignments(statement.text)[0]:
            value = _unquoted(value, known)
            known[name] = f"{known.get(name, '')}{added}{value}" if added is not None else value
    return known


def only_sets(statement: Statement) -> bool:
    """Whether a statement sets variables, and starts nothing."""
    made, rest = _assignments(statement.text)
    return bool(made) and not COMMENT.sub("", rest).strip(" \t\n;&")


def expand(text: str, known: dict[str, str]) -> str:
    """A text with its variables written out: those of the script, else those of the environment."""

    def value(match: re.Match) -> str:
        name = match[1] or match[3]
        other = known.get(name, os.environ.get(name))
        if match[2] is not None and not other:
            return expand(match[2].strip("\"'"), known)
        return match[0] if other is None else other

    def reckoned(match: re.Match) -> str:
        inner = re.sub(r"\b[A-Za-z_]\w*", lambda name: known.get(name[0], name[0]), match[1])
        try:
            return str(_number(ast.parse(inner.strip(), mode="eval").body))
        except (SyntaxError, ValueError, ZeroDivisionError, KeyError):
            return match[0]

    return RECKONED.sub(reckoned, VARIABLE.sub(value, text))


def unknown(text: str) -> str | None:
    """The first variable, argument or program of a text that is not written out."""
    found = UNKNOWN.search(text)
    return found[0] if found else None


def _goes_on(text: str) -> bool:
    """Whether a value that a statement sets goes on in the next line: an array, or one in quotes."""
    match = NAMED.match(text)
    return match is not None and _end(text, match.end()) is None


def _assignments(text: str) -> tuple[list[tuple[str, str | None, str]], str]:
    """Variables that a statement begins with: name, what joins the value to the one before, value.

    The second one is the rest of the statement.
    """
    made = []
    while match := NAMED.match(text):
        end = _end(text, match.end())
        value = text[match.end() : end]
        joint = None if not match[2] else " " if value.startswith("(") else ""
        made.append((match[1], joint, value))
        text = "" if end is None else text[end:].lstrip(" \t;")
    return made, text


def _end(text: str, start: int) -> int | None:
    """Where the word that begins there ends; None where quotes or brackets are open."""
    open_: list[str] = []
    index = start
    while index < len(text):
        sign = text[index]
        if sign == "\\" and open_[-1:] != ["'"]:
            index += 1
        elif open_ and sign == open_[-1]:
            open_.pop()
        elif sign in CLOSING and _opens(sign, text[index - 1], open_[-1] if open_ else ""):
            open_.append(CLOSING[sign])
        elif not open_ and (sign.isspace() or sign in ";&|"):
            return index
        index += 1
    return None if open_ else len(text)


def _opens(sign: str, before: str, within: str) -> bool:
    """Whether a bracket or quote begins something. within: what ends that which it stands in."""
    if within in ("'", "`"):
        return False
    if sign == "{":
        return before == "$"
    return sign != "(" or within != '"' or before in "$("


def _unquoted(value: str, known: dict[str, str]) -> str:
    """A value as the shell has it. An array is its words."""
    value = value.strip()
    if value[:1] == value[-1:] == "'" and len(value) > 1:
        return value[1:-1]
    if value.startswith("("):
        return expand(COMMENT.sub("", value[1:-1]).replace("\n", " ").strip(), known)
    if value[:1] == value[-1:] == '"' and len(value) > 1:
        return expand(value[1:-1].replace('\\"', '"'), known)
    return expand(value, known).replace('"', "")


def _number(node: ast.expr) -> int:
    """A sum or product of whole numbers. Raises ValueError, KeyError."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.BinOp):
        return OPERATORS[type(node.op)](_number(node.left), _number(node.right))
    raise ValueError
