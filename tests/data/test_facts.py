"""Shares that are measured of the data: each on rows that have it, counted by hand."""

import json

import numpy as np
import pytest

pytest.importorskip("datasets")

from dpo_fast.data.config import DataConfig
from dpo_fast.data.dataset import load_examples
from dpo_fast.data.facts import data_facts, likeness, text_hashes
from dpo_fast.data.stream import ExampleStream
from tests.support.tokenizers import byte_tokenizer

ROWS = [
    ("first? ", "yes", "no"),
    ("first? ", "yes", "no"),  # a duplicate
    ("first? ", "no", "yes"),  # the other way round
    ("second? ", "a" * 60, "a" * 58 + "xy"),  # nearly equal, of one length
    ("second? ", "long answer", "short"),
    ("third? ", "tiny", "a much longer one"),
]


def write(file, rows=ROWS):
    rows = [dict(zip(("prompt", "chosen", "rejected"), row)) for row in rows]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def config(folder, **options):
    return DataConfig(train=write(folder / "rows.jsonl"), cache_dir=str(folder), **options)


def test_shares_are_those_counted_by_hand(tmp_path):
    pairs = load_examples(config(tmp_path), byte_tokenizer(), split="train")
    facts = data_facts(pairs)
    assert facts["rows"] == 6 and facts["duplicates"] == pytest.approx(1 / 6)
    assert facts["contradictory"] == pytest.approx(3 / 6)
    assert facts["nearly_equal"] == pytest.approx(1 / 6)
    # Of five pairs of unequal length the chosen one is longer in three.
    assert (facts["unequal"], facts["chosen_longer"]) == (5, 3 / 5)
    assert facts["prompts_cut"] == facts["answers_cut"] == 0 and "leaked" not in facts


def test_rows_of_the_evaluation_that_are_trained_on(tmp_path):
    other = write(tmp_path / "eval.jsonl", [ROWS[0], ("new? ", "yes", "no"), ROWS[5]])
    options = config(tmp_path, eval=other)
    train, evaluation = (
        load_examples(options, byte_tokenizer(), split=split) for split in ("train", "eval")
    )
    assert data_facts(train, evaluation)["leaked"] == pytest.approx(2 / 3)


def test_what_is_cut_counts(tmp_path):
    rows = [("p" * 50, "yes", "no"), ("short? ", "yes", "no"), *ROWS[4:], *ROWS[:1], ROWS[2]]
    options = DataConfig(
        train=write(tmp_path / "long.jsonl", rows), cache_dir=str(tmp_path), max_length=40
    )
    facts = data_facts(load_examples(options, byte_tokenizer(), split="train"))
    assert facts["prompts_cut"] == pytest.approx(1 / 6) and facts["answers_cut"] == 0


def test_a_stream_measures_its_chunk_alike(tmp_path):
    options = config(tmp_path, streaming=True, stream_buffer=6)
    chunk = ExampleStream(options, byte_tokenizer()).read()
    stored = load_examples(config(tmp_path), byte_tokenizer(), split="train")
    assert data_facts(chunk) == data_facts(stored)


def test_hashes_tell_order_length_and_place_apart():
    class Lists:
        def __init__(self, lists):
            self.lists = lists

        def __len__(self):
            return len(self.lists)

        def column(self, name, indices):
            import pyarrow

            return pyarrow.array([self.lists[index] for index in indices])

    lists = [[1, 2], [2, 1], [1, 2, 0], [0, 1, 2], [], [0], [1, 2], [[1], [2]][0] + [2]]
    hashes = text_hashes(Lists(lists), "any")
    same = {(a, b) for a in range(8) for b in range(8) if a < b and hashes[a] == hashes[b]}
    assert same == {(0, 6), (0, 7), (6, 7)}
    many = np.unique(text_hashes(Lists([[a, b] for a in range(99) for b in range(99)]), "any"))
    assert len(many) == 99 * 99


def test_likeness():
    assert likeness([1, 2, 3, 4], [1, 2, 9, 4]) == 0.75
    assert likeness([1, 1], [1, 1, 1, 1]) == 0.5 and likeness([], []) == 1.0
    assert likeness([1], [2]) == 0.0
