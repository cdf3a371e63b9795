"""The history of a run that the client of W&B wrote offline: a log in LevelDB's format."""

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path

BLOCK, FILE_HEADER, RECORD_HEADER = 32768, 7, struct.Struct("<IHB")  # checksum, length, kind
LAST_KINDS = (1, 4)  # a whole record, or the last part of one


def history(folder: Path) -> list[dict]:
    """Every logged line of the one run in `folder`."""
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    lines = []
    for record in parsed(file):
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            lines.append(
                {(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in items}
            )
    return lines


def parsed(file: Path) -> list:
    """The records of a run that has ended. Its client may write the last of them behind `finish`."""
    from wandb.proto import wandb_internal_pb2

    found, deadline = [], time.monotonic() + 60
    while "exit" not in [each.WhichOneof("record_type") for each in found]:
        assert time.monotonic() < deadline, f"{file} has no end"
        time.sleep(0.05)
        found = [wandb_internal_pb2.Record.FromString(data) for data in records(file.read_bytes())]
    return found


def records(content: bytes) -> Iterator[bytes]:
    """The records of a log, each put together from its parts."""
    place, parts = FILE_HEADER, []
    while place + RECORD_HEADER.size <= len(content):
        if BLOCK - place % BLOCK < RECORD_HEADER.size:  # the rest of a block is padding
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = RECORD_HEADER.unpack_from(content, place)
        place += RECORD_HEADER.size
        parts.append(content[place : place + length])
        place += length
        if kind in LAST_KINDS:
            yield b"".join(parts)
            parts = []
