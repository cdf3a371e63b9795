"""JSON and JSON Lines as a stream of (where, row)."""

from __future__ import annotations

import codecs
import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from dpo_fast.data.json_text import NotFinite, Refused, decode, decode_at
from dpo_fast.data.lines import BYTE_ORDER_MARK, PIECE, check_size, opened, read_lines, too_long
from dpo_fast.data.verdicts import BadRow, BadRows
from dpo_fast.errors import UserError
from dpo_fast.wording import printable

RawRows = Iterator[tuple[str, dict[str, Any]]]  # (where, row)
SPACE = " \t\r\n"


def json_lines(path: Path, bad: BadRows) -> RawRows:
    """The rows of a file with one object per line."""
    for number, line in read_lines(path, bad.max_row_bytes):
        where = f"{path}:{number}"
        try:
            if line is None:
                raise too_long(bad.max_row_bytes)
            row = _parse_line(line, bad.ignored)
            if len(line) > bad.max_row_bytes:
                check_size(row, bad.max_row_bytes)
        except BadRow as verdict:
            bad.reject(where, verdict)
        else:
            yield where, row


def _parse_line(line: bytes, ignored: Collection[str]) -> dict[str, Any]:
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise BadRow("bad UTF-8", f"byte {error.start + 1} of the line: {error.reason}") from None
    try:
        return _as_row(decode(text))
    except json.JSONDecodeError as error:
        detail = f"{error.msg} at column {error.colno}; expected one JSON object per line"
        raise BadRow("broken JSON", detail) from None
    except Refused as error:
        return _without_ignored(error, ignored)
    except BadRow:
        raise
    except ValueError as error:
        raise BadRow("broken JSON", str(error)) from None


def _as_row(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        kind = {list: "an array", str: "text", type(None): "null"}.get(type(value), "a number")
        raise BadRow("not an object", f"expected an object of fields, got {kind}")
    return value


def _without_ignored(error: Refused, ignored: Collection[str]) -> dict[str, Any]:
    """The row without its ignored columns, if those alone are refused. Raises BadRow."""
    if (row := error.without(ignored)) is None:
        raise _refused(error) from None
    return row


def _refused(error: Refused) -> BadRow:
    if not isinstance(error, NotFinite):
        return BadRow("broken JSON", str(error))
    if error.field is None:
        return BadRow("not an object", f"expected an object of fields; {error}")
    field = printable(error.field)
    remedy = f"list {field!r} in data.ignore_columns if nothing needs it"
    return BadRow(f"field {field!r} is not finite", f"{error}, or {remedy}")


def json_array(path: Path, bad: BadRows) -> RawRows:
    """The objects of a JSON array, of which no more than a row and a piece of the file are in memory."""
    text = _Text(path, bad.max_row_bytes)
    text.skip("[")
    separator = "["
    while True:
        if text.next() == "]" and separator == "[":
            break
        where = f"{path}:{text.line}"
        try:
            row = _array_row(text, bad.ignored)
        except BadRow as verdict:
            bad.reject(where, verdict)
        else:
            yield where, row
        separator = text.next()
        if separator == "]":
            break
        if separator != ",":
            raise text.broken("expected ',' or ']'")
        text.skip(",")
    text.skip("]")
    if text.next():
        raise text.broken("text after the end of the array")


def _array_row(text: _Text, ignored: Collection[str]) -> dict[str, Any]:
    try:
        return _as_row(text.value())
    except Refused as error:
        return _without_ignored(error, ignored)


class _Text:
    """A text that is read piece by piece, and its value at hand.

    line: of the place where it is, from 1. column: before that place.
    """

    def __init__(self, path: Path, limit: int) -> None:
        self.path, self.limit = path, limit
        self.line, self._column = 1, 0
        self._place = 0  # in `_text`; what is before it is done with
        self._text, self._ended = "", False
        self._pieces = self._read()

    def _read(self) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")()
        lines, column, place, held = 1, 0, [1], b""
        with opened(self.path, place) as file:
            piece = file.read(PIECE).removeprefix(BYTE_ORDER_MARK)
            while piece:
                try:
                    yield decoder.decode(piece, final=False)
                except UnicodeDecodeError as error:
                    before = error.object[: error.start]
                    lines += before.count(b"\n")
                    column = (0 if b"\n" in before else column) + len(before.rpartition(b"\n")[2])
                    reason = f"bad UTF-8: byte {column + 1} of the line: {error.reason}"
                    raise UserError(f"{self.path}:{lines}: {reason}") from None
                pending = held + piece
                held = decoder.getstate()[0]
                done = pending[: len(pending) - len(held)]
                lines += done.count(b"\n")
                column = (0 if b"\n" in done else column) + len(done.rpartition(b"\n")[2])
                place[0] = lines
                piece = file.read(PIECE)
            if decoder.getstate()[0]:
                raise UserError(f"{self.path}:{lines}: bad UTF-8: it ends within a character")

    def _more(self) -> bool:
        """Reads on; False at the end of the file."""
        piece = next(self._pieces, None)
        self._ended = piece is None
        if piece:
            self._text = self._text[self._place :] + piece
            self._place = 0
        return not self._ended

    def _pass(self, end: int) -> None:
        passed = self._text[self._place : end]
        self.line += passed.count("\n")
        after = passed.rpartition("\n")[2]
        self._column = len(after) + (0 if "\n" in passed else self._column)
        self._place = end

    def next(self) -> str:
        """The next character that is no white space; nothing at the end."""
        passed = 0
        while True:
            end = self._place
            while end < len(self._text) and self._text[end] in SPACE:
                end += 1
            passed += end - self._place
            self._pass(end)
            if end < len(self._text):
                return self._text[end]
            if passed > 256 * self.limit:
                raise self.broken("nothing but white space follows")
            if not self._more():
                return ""

    def skip(self, character: str) -> None:
        """Go on after a character that is next."""
        if self.next() != character:
            raise self.broken(f"expected {character!r}")
        self._pass(self._place + 1)

    def value(self) -> Any:
        """The JSON value that is next. Raises Refused, BadRow, and UserError where it is broken."""
        wanted = PIECE
        while True:
            size, value = len(self._text) - self._place, None
            try:
                value, end = decode_at(self._text, self._place)
                fault = None
            except Refused as error:
                end, fault = self._end_of_value(), error
            except ValueError as error:
                end, fault = None, error
            # A number may go on in the next piece.
            sure = self._ended or isinstance(value, (dict, list)) or fault is not None
            if end is not None and (sure or end < len(self._text)):
                return self._found(value, end, fault)
            if self._ended or size > self.limit:
                raise self._undecoded(fault, size)
            wanted = max(wanted, 2 * size)
            while len(self._text) - self._place < wanted and self._more():
                pass

    def _undecoded(self, fault: ValueError | None, size: int) -> UserError:
        more = f", or it is {too_long(self.limit).fault}" if size > self.limit else ""
        error = self.broken(fault or "expected an object")
        return UserError(f"{error}{more}")

    def _found(self, value: Any, end: int, fault: ValueError | None) -> Any:
        size = end - self._place
        self._pass(end)
        if size > self.limit:
            raise too_long(self.limit)
        if fault is not None:
            raise fault
        return value

    def _end_of_value(self) -> int | None:
        """Where the value ends that is next, whatever it holds; None where that cannot be told yet."""
        try:
            return json.JSONDecoder().raw_decode(self._text, self._place)[1]
        except (ValueError, RecursionError):
            return None

    def broken(self, error: object) -> UserError:
        """The error of the place where the text is, or where a JSONDecodeError says."""
        line, column, message = self.line, self._column, error
        if isinstance(error, json.JSONDecodeError):
            passed = self._text[self._place : error.pos]
            line += passed.count("\n")
            column = len(passed.rpartition("\n")[2]) + (0 if "\n" in passed else column)
            message = error.msg
        return UserError(
            f"{self.path}:{line}: broken JSON: {message} at column {column + 1}; expected an array of "
            "objects"
        )
