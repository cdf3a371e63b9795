"""Log-probs of single sequences on disk, and references that are filled with them."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet
import pytest

from dpo_fast.data.config import DataConfig
from dpo_fast.data.dataset import load_examples
from dpo_fast.data.kinds import COMPLETIONS, GROUPS, PAIRS
from dpo_fast.errors import UserError
from dpo_fast.references import artefact, blocks
from dpo_fast.references.artefact import names_of, read_columns
from dpo_fast.references.sequences import fill, read_sequences, sequence_digest, write_sequences
from dpo_fast.references.store import Place, Request, find_stored
from tests.support.models import write_completions, write_groups, write_pairs
from tests.support.tokenizers import byte_tokenizer

WRITE = {PAIRS: write_pairs, COMPLETIONS: write_completions, GROUPS: write_groups}


def examples_of(folder, kind, count=6):
    file = WRITE[kind](folder / f"{kind.name}.jsonl", count)
    config = DataConfig(train=str(file), max_length=128, cache_dir=str(folder / "cache"))
    return load_examples(config, byte_tokenizer(), split="train")


def sequences(examples) -> list[tuple[list[int], list[int]]]:
    return [
        (each["prompt_ids"], ids)
        for each in (examples[i] for i in range(len(examples)))
        for ids in examples.kind.answer_ids(each)
    ]


def logps_of(found, offset=0.0) -> dict[bytes, np.ndarray]:
    """Made up, and told apart by their tokens."""
    return {
        sequence_digest(p, a): -np.arange(1, len(a) + 1, dtype=np.float32) - sum(a) / 1e3 - offset
        for p, a in found
    }


def request(examples, per_token=False, **changes) -> Request:
    options = {"model": "hash", "dtype": "fp32", "per_token": per_token} | changes
    return Request("train", examples, **options)


@pytest.mark.parametrize("kind", [PAIRS, COMPLETIONS, GROUPS], ids=lambda kind: kind.name)
@pytest.mark.parametrize("per_token", [False, True])
def test_a_reference_of_every_kind_is_filled(tmp_path, monkeypatch, kind, per_token):
    monkeypatch.setattr(blocks, "MOST", 4)  # two parts
    examples = examples_of(tmp_path, kind)
    found = sequences(examples)
    logps = logps_of(found)
    file, folder = tmp_path / "logps.parquet", tmp_path / "reference"
    write_sequences(file, "hash", "fp32", logps)
    asked = request(examples, per_token)
    assert fill(folder, asked, [read_sequences(file)])
    assert find_stored(Place(folder), asked) == [folder]
    (sums,) = columns(folder, kind, "logps")
    assert sums == pytest.approx([logps[sequence_digest(*each)].sum() for each in found])
    if per_token:
        (tokens,) = columns(folder, kind, "token_logps")
        assert np.concatenate(tokens) == pytest.approx(
            np.concatenate([logps[sequence_digest(*each)] for each in found])
        )


def columns(folder, kind, what) -> list[list]:
    """The values of all sequences, in their order."""
    names = names_of(kind, what)
    rows = read_columns(folder, names).to_pylist()
    values = [row[name] for row in rows for name in names]
    return [[one for each in values for one in each] if kind.many else values]


def test_several_rounds_fill_one_reference_together(tmp_path):
    examples = examples_of(tmp_path, PAIRS)
    found = sequences(examples)
    files = []
    for number, part in enumerate((found[:5], found[3:])):
        files.append(tmp_path / f"{number}.parquet")
        write_sequences(files[-1], "hash", "fp32", logps_of(part))
    known = [read_sequences(file) for file in files]
    assert not fill(tmp_path / "a", request(examples), known[:1])
    assert not fill(tmp_path / "a", request(examples), known[1:])
    assert not (tmp_path / "a").exists()
    assert fill(tmp_path / "a", request(examples), known)


@pytest.mark.parametrize("change", [{"model": "other"}, {"dtype": "bf16"}])
def test_log_probs_of_another_model_fill_nothing(tmp_path, change):
    examples = examples_of(tmp_path, PAIRS)
    write_sequences(tmp_path / "s.parquet", "hash", "fp32", logps_of(sequences(examples)))
    known = [read_sequences(tmp_path / "s.parquet")]
    assert not fill(tmp_path / "a", request(examples, **change), known)
    assert fill(tmp_path / "a", request(examples), known)


def test_a_filling_that_was_killed_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "MOST", 2)
    examples = examples_of(tmp_path, PAIRS)
    write_sequences(tmp_path / "s.parquet", "hash", "fp32", logps_of(sequences(examples)))
    known = [read_sequences(tmp_path / "s.parquet")]
    add, count = artefact.Growing.add, []

    def killed(self, table):
        if len(count) == 2:
            raise KeyboardInterrupt
        count.append(len(table))
        add(self, table)

    monkeypatch.setattr(artefact.Growing, "add", killed)
    pytest.raises(KeyboardInterrupt, fill, tmp_path / "a", request(examples), known)
    count.clear()
    monkeypatch.setattr(artefact.Growing, "add", lambda *a: count.append(len(a[1])) or add(*a))
    assert fill(tmp_path / "a", request(examples), known) and len(count) == 1
    assert find_stored(Place(tmp_path / "a"), request(examples)) == [tmp_path / "a"]


def test_prompt_and_answer_and_what_is_scored_are_all_in_the_digest():
    cases = [
        ([1, 2], [3], None),
        ([1], [2, 3], None),
        ([1, 2], [3, 4], None),
        ([1, 2], [3, 4], [False, True]),
        ([1, 2], [3, 4], [True, False]),
    ]
    assert len({sequence_digest(*case) for case in cases}) == len(cases)
    assert sequence_digest([1], [2], [True]) == sequence_digest([1], [2])


def test_no_sequences_are_a_file_too(tmp_path):
    write_sequences(tmp_path / "s.parquet", "hash", "fp32", {})
    assert len(read_sequences(tmp_path / "s.parquet").table) == 0


def test_what_is_damaged_is_told(tmp_path):
    file = tmp_path / "s.parquet"
    write_sequences(file, "hash", "fp32", {b"a" * 32: np.arange(2000, dtype=np.float32)})
    content = file.read_bytes()
    for damaged in (
        content[: len(content) // 2],
        b"",
        b"PAR1",
        content[:2000] + b"x" + content[2001:],
    ):
        file.write_bytes(damaged)
        with pytest.raises(
            UserError, match="s.parquet holds no log-probs of sequences, or is damaged"
        ):
            read_sequences(file)
    pyarrow.parquet.write_table(pyarrow.table({"digest": [b"a"]}), file)
    with pytest.raises(UserError, match="holds no log-probs of sequences"):
        read_sequences(file)
    with pytest.raises(UserError, match="none holds no log-probs"):
        read_sequences(tmp_path / "none")
