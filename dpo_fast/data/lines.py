"""Lines and pieces of a text file, gzipped or not, in bounded memory: a megabyte may unpack to many."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from dpo_fast.data.verdicts import BadRow
from dpo_fast.errors import UserError

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
PIECE = 1 << 20
# What is passed over in search of the next row: so many times the bytes of one, and so many lines.
# What goes on is no data.
PATIENCE, BLANK_LINES = 256, 1_000_000
DATA_URI = b";base64,"  # before an image in a line
LARGEST_IMAGES = 256 << 20  # bytes of a line with images
Line = tuple[int, bytes | None]  # its number from 1; its bytes, None if they are too many


@contextmanager
def opened(path: Path, place: list[int]) -> Iterator[BinaryIO]:
    """The file's bytes, unpacked. A fault on the way is a UserError that names the line place[0]."""
    opener = gzip.open if path.name.lower().endswith(".gz") else open
    try:
        with opener(path, "rb") as file:
            yield file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(
            f"{path}:{place[0]}: the gzip file is damaged or cut short ({error}); copy it again"
        ) from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error


def read_lines(path: Path, limit: int, blank: bool = False) -> Iterator[Line]:
    """Each line, or only those that are not blank.

    limit: bytes of a line, at most. What is longer comes as None, but for one that holds images.

    Raises:
        UserError: the file cannot be read to its end, or goes on for long without a line of that length.
    """
    place, passed, blanks = [1], 0, 0
    with opened(path, place) as file:
        # Splitting bytes, not text: str.splitlines would also break at U+2028 inside a string.
        for line in iter(lambda: file.readline(limit + 1), b""):
            number = place[0]
            if number == 1:
                line = line.removeprefix(BYTE_ORDER_MARK)
            most = limit
            if len(line) > limit and DATA_URI in line:
                most = LARGEST_IMAGES
                line += file.readline(most + 1 - len(line))
            if len(line) > most:
                for rest in iter(lambda: file.readline(PIECE), b""):
                    passed += len(rest)
                    _check_patience(path, number, passed > PATIENCE * limit)
                    if rest.endswith(b"\n"):
                        break
                yield number, None
            elif blank or line.strip():
                passed, blanks = 0, 0
                yield number, line
            else:
                blanks += 1
                _check_patience(path, number, blanks > BLANK_LINES)
            place[0] += 1


def _check_patience(path: Path, number: int, ended: bool) -> None:
    if ended:
        raise UserError(
            f"{path}:{number}: no row for long: lines are blank, or longer than data.max_row_bytes; "
            "expected one row per line"
        )


def too_long(limit: int) -> BadRow:
    """The verdict against a row of more bytes than data.max_row_bytes."""
    return BadRow(
        f"more than data.max_row_bytes={limit}",
        "raise it if rows are meant to be so long, as with images in base64; tokenising takes about 300 "
        "bytes of memory for each",
    )


def first_byte(path: Path, limit: int) -> bytes:
    """The first byte of a file that is no white space; nothing if there is none."""
    with opened(path, [1]) as file:
        passed = 0
        start = file.read(PIECE).removeprefix(BYTE_ORDER_MARK)
        while start and not start.strip():
            passed += len(start)
            _check_patience(path, 1, passed > PATIENCE * limit)
            start = file.read(PIECE)
    return start.lstrip()[:1]


def check_size(row: Any, limit: int) -> None:
    """Raises BadRow for a row whose texts have more bytes, or as many characters, together.

    Images, which are not tokenised, do not count: bytes, and data URIs.
    """
    left, passed = [row], 0
    while left:
        value = left.pop()
        if isinstance(value, str):
            passed += 0 if value.startswith("data:image/") else len(value)
        elif isinstance(value, dict):
            left += value.values()
        elif isinstance(value, (list, tuple)):
            passed += len(value)
            left += value
        if passed > limit:
            raise too_long(limit)
