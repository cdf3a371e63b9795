"""Log-probs that are there: with the data, or stored for all of their rows."""

import hashlib
import json

import pyarrow
import pyarrow.parquet
import pytest

pytest.importorskip("datasets")

from dpo_fast.data.config import DataConfig
from dpo_fast.data.dataset import load_examples
from dpo_fast.references.at_hand import logps_at_hand
from tests.support.tokenizers import byte_tokenizer

ROWS = [{"prompt": f"{i}? ", "chosen": "yes", "rejected": "no"} for i in range(4)]


def load(folder, rows):
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(train=str(file), cache_dir=str(folder / "cache"))
    return load_examples(config, byte_tokenizer(), split="train")


def store(folder, digests, first: float) -> None:
    folder.mkdir(parents=True)
    numbers = [first + index for index in range(len(digests))]
    table = {"digest": digests, "chosen_logps": numbers, "rejected_logps": [-n for n in numbers]}
    pyarrow.parquet.write_table(pyarrow.table(table), folder / "part-00000.parquet")
    digest = hashlib.sha256((folder / "part-00000.parquet").read_bytes()).hexdigest()
    (folder / "_manifest.json").write_text(json.dumps({"parts": {"part-00000.parquet": digest}}))


def test_columns_of_the_data(tmp_path):
    columns = {"reference_chosen_logps": -3.0, "reference_rejected_logps": -5.0}
    pairs = load(tmp_path, [row | columns for row in ROWS])
    assert logps_at_hand(tmp_path / "none", pairs).tolist() == [[-3.0, -5.0]] * 4


def test_a_store_that_has_all_rows_in_any_order(tmp_path):
    pairs = load(tmp_path, ROWS)
    assert logps_at_hand(tmp_path / "reference", pairs) is None
    store(tmp_path / "reference" / "a", pairs.digests[:3], 100.0)
    assert logps_at_hand(tmp_path / "reference", pairs) is None
    store(tmp_path / "reference" / "b", pyarrow.array(pairs.digests.to_pylist()[::-1]), 10.0)
    found = logps_at_hand(tmp_path / "reference", pairs)
    assert found.tolist() == [[13.0, -13.0], [12.0, -12.0], [11.0, -11.0], [10.0, -10.0]]
