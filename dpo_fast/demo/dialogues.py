"""Real preference pairs: dialogues of Anthropic's HH data, harmlessness, as chats."""

from __future__ import annotations

import gzip
import json
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from dpo_fast.errors import UserError

HUB = {"path": "Anthropic/hh-rlhf", "data_dir": "harmless-base", "split": "test"}
TURN = re.compile(r"\n\n(Human|Assistant):")
ROLES = {"Human": "user", "Assistant": "assistant"}
Chat = list[dict[str, str]]


def read(file: Path | None) -> Iterator[dict[str, Any]]:
    """Rows of a JSON Lines file, plain or gzipped; without one those of the hub.

    Raises:
        UserError: naming the file and line, or that the hub cannot be reached.
    """
    if file is None:
        yield from _download()
        return
    opener = gzip.open if file.suffix == ".gz" else open
    try:
        with opener(file, "rt", encoding="utf-8") as stream:
            for number, line in enumerate(stream, 1):
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise UserError(f"{file}:{number} is not JSON: {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--rows {file} cannot be read: {error}") from None


def _download() -> Iterable[dict[str, Any]]:
    import datasets

    try:
        return datasets.load_dataset(**HUB)
    except Exception as error:  # whatever the hub's client, the network or the cache raise
        raise UserError(
            f"{HUB['path']} cannot be downloaded: {str(error).splitlines()[0]}. Connect to a network, or "
            "name a file of its rows: --rows test.jsonl.gz"
        ) from error


def pair_of(row: dict[str, Any]) -> dict[str, Chat] | None:
    """A row as prompt, chosen and rejected messages; None if its dialogues part before the last answer.

    Raises:
        UserError: it has no texts of Human: and Assistant: turns.
    """
    try:
        chosen, rejected = turns(row["chosen"]), turns(row["rejected"])
    except (KeyError, TypeError) as error:
        raise UserError(
            f"--rows: expected texts of turns, '\\n\\nHuman: ...\\n\\nAssistant: ...', as chosen and "
            f"rejected, and met {json.dumps(row)[:200]} ({error})"
        ) from None
    expected = ["user", "assistant"] * (len(chosen) // 2)
    whole = all(message["content"] for message in chosen + rejected)
    alike = chosen[:-1] == rejected[:-1] and chosen[-1:] != rejected[-1:]
    if not whole or not alike or [message["role"] for message in chosen] != expected:
        return None
    return {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}


def turns(text: str) -> Chat:
    """The messages of a dialogue."""
    start, *parts = TURN.split(text)
    if start.strip() or not parts:
        raise TypeError("no Human: at the start")
    return [
        {"role": ROLES[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2])
    ]


def split(
    rows: Iterable[dict[str, Any]], train: int, held_out: int, characters: int, seed: int
) -> tuple[list[dict], list[dict]]:
    """`train` pairs and `held_out` pairs of at most so many characters, in an order of the seed.

    No dialogue of training begins with the same question as one that is held out.

    Raises:
        UserError: there are too few.
    """
    pairs = [pair for pair in map(pair_of, rows) if pair and _characters(pair) <= characters]
    random.Random(seed).shuffle(pairs)
    kept = pairs[:held_out]
    asked = {_opening(pair) for pair in kept}
    others = [pair for pair in pairs[held_out:] if _opening(pair) not in asked]
    if len(others) < train:
        raise UserError(
            f"--rows has {len(others)} pairs of at most {characters} characters beside {len(kept)} held "
            f"out; expected {train}"
        )
    return others[:train], kept


def _characters(pair: dict[str, Chat]) -> int:
    return sum(len(message["content"]) for messages in pair.values() for message in messages)


def _opening(pair: dict[str, Chat]) -> str:
    return pair["prompt"][0]["content"]
