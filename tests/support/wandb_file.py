"""The history of a run that the client of W&B wrote offline: a log in LevelDB's format."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path

BLOCK, FILE_HEADER, RECORD_HEADER = 32768, 7, struct.Struct("<IHB")  # checksum, length, kind
LAST_KINDS = (1, 4)  # a whole record, or the last part of one


def history(folder: Path) -> list[dict]:
    """Every logged line of the one run in `folder`."""
    from wandb.proto import wandb_internal_pb2

    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    lines = []
    for data in records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            lines.append(
                {(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in items}
            )
    return lines


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
