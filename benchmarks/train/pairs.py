"""The pairs of `bench train`: one file of prompt, chosen and rejected that every contender reads.

A pair is kept if it fits, so nothing is truncated, and if no token straddles the end of its prompt, so all
contenders train on the same ids.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

from benchmarks.tokenizer import EOS, VOCABULARY, train_tokenizer, word_tokenizer
from dpo_fast.data.config import DataConfig
from dpo_fast.data.rows import PairRow, parse_row
from dpo_fast.data.sources import read_rows, resolve
from dpo_fast.data.verdicts import BadRow, BadRows, Dropped
from dpo_fast.errors import UserError

# Mean and standard deviation of ln(tokens) over 1,495 pairs of HH harmless, with a vocabulary of 8,192 and
# the end of turn. The medians are 95, 29 and 37 tokens, the means 123, 42 and 53.
HH_LENGTHS = {"prompt": (4.37, 1.00), "chosen": (3.37, 0.87), "rejected": (3.56, 0.93)}
TEXTS = ("prompt", "chosen", "rejected")


@dataclass(frozen=True)
class Pairs:
    """rows: texts and ids of each pair. origin: where they come from, in words."""

    rows: list[dict]
    tokenizer: object
    origin: str

    def write(self, file: Path) -> Path:
        lines = [json.dumps({name: row[name] for name in TEXTS}) + "\n" for row in self.rows]
        file.write_text("".join(lines))
        return file


def read_pairs(name: str, vocabulary: int, max_length: int, count: int, seed: int = 0) -> Pairs:
    """Up to `count` pairs of a source that `data.train` would take, drawn at random.

    Their tokenizer is a byte-level BPE of at most 8,192 tokens, trained on their text.
    """
    config = DataConfig(train=name, on_bad_row="skip", max_length=max_length)
    bad, texts = BadRows("skip"), []
    for source in resolve([name]):
        for where, raw in read_rows(source, bad):
            try:
                texts.append(_texts(parse_row(where, raw, config)))
            except (BadRow, Dropped) as verdict:
                bad.reject(where, verdict)
    if not texts:
        raise UserError(f"--data {name}: no usable pair in it ({bad.total} bad rows)")
    tokenizer = train_tokenizer([" ".join(row.values()) for row in texts], vocabulary)
    kept = _kept(texts, tokenizer, max_length, count, seed)
    origin = f"{len(kept)} of {len(texts)} pairs of {Path(name).name}"
    origin += f" ({bad.total} bad rows left out)" if bad.total else ""
    return Pairs(kept, tokenizer, origin)


def draw_pairs(
    vocabulary: int, max_length: int, count: int, ratio: float | None, seed: int = 0
) -> Pairs:
    """Pairs of random words, one token each, with the lengths of HH harmless.

    ratio: length of a prompt over the mean length of its two answers.
    """
    draw = random.Random(seed)
    words = [f"w{number}" for number in range(min(VOCABULARY, vocabulary))]
    tokenizer, texts = word_tokenizer(words), []
    while len(texts) < 2 * count:  # more than enough of them fit
        lengths = {
            name: max(2, round(draw.lognormvariate(*law))) for name, law in HH_LENGTHS.items()
        }
        if ratio is not None:
            lengths["prompt"] = max(1, round(ratio * (lengths["chosen"] + lengths["rejected"]) / 2))
        lengths["chosen"] -= 1  # the end of turn
        lengths["rejected"] -= 1
        parts = {name: draw.choices(words[3:], k=length) for name, length in lengths.items()}
        texts.append(
            {name: (" " if name != "prompt" else "") + " ".join(p) for name, p in parts.items()}
        )
    kept = _kept(texts, tokenizer, max_length, count, seed)
    shape = f"prompts {ratio:g} times the answers" if ratio else "the prompts' of HH harmless too"
    origin = f"{len(kept)} random pairs, answer lengths of HH harmless, {shape}"
    return Pairs(kept, tokenizer, origin)


def _texts(row: PairRow) -> dict[str, str]:
    """The three texts; messages become turns as in HH."""
    if not row.is_chat:
        return {name: getattr(row, name) for name in TEXTS}
    names = {"user": "Human", "assistant": "Assistant"}
    prompt = "".join(
        f"\n\n{names.get(m['role'], m['role'].title())}: {m['content']}" for m in row.prompt
    )
    answers = {name: "".join(f" {m['content']}" for m in getattr(row, name)) for name in TEXTS[1:]}
    return {"prompt": f"{prompt}\n\nAssistant:", **answers}


def _kept(texts: list[dict], tokenizer, max_length: int, count: int, seed: int) -> list[dict]:
    """Up to `count` pairs, drawn at random, with their ids."""
    order = random.Random(seed).sample(range(len(texts)), len(texts))
    kept: list[dict] = []
    for index in order:
        if len(kept) == count:
            break
        row = texts[index] | _ids(texts[index], tokenizer)
        if row["clean"] and row["longest"] <= max_length:
            kept.append(row)
    return kept


def _ids(row: dict[str, str], tokenizer) -> dict:
    """Ids of the three parts, the length of the longer sequence, and whether the pair is clean.

    In a clean pair no token straddles the end of the prompt, no text holds an end of turn, and the answers
    differ.
    """
    prompt = tokenizer(row["prompt"])["input_ids"]
    ids = {"prompt_ids": prompt, "clean": bool(prompt), "longest": 0}
    for name in ("chosen", "rejected"):
        whole = tokenizer(row["prompt"] + row[name] + EOS)["input_ids"]
        ids[f"{name}_ids"] = whole[len(prompt) :]
        ids["clean"] &= whole[: len(prompt)] == prompt and len(whole) > len(prompt) + 1
        ids["clean"] &= EOS not in row["prompt"] + row[name]
        ids["longest"] = max(ids["longest"], len(whole))
    ids["clean"] &= ids["chosen_ids"] != ids["rejected_ids"]
    return ids
