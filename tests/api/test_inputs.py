"""Objects as files: the same content under the same name, and errors that name row and field."""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from dpo_fast.api.inputs import is_name, model_folder, rows_file, tokenizer_folder
from dpo_fast.errors import UserError

ROWS = [
    {"prompt": "a", "chosen": "b", "rejected": "c"},
    {"prompt": "d", "chosen": "ä", "rejected": "f", "weight": np.float32(0.5)},
]


def test_rows_of_any_kind_are_files_that_the_trainer_reads(tmp_path):
    class OfTorch:
        def __len__(self):
            return len(ROWS)

        def __getitem__(self, index):
            return ROWS[index]

    listed = rows_file(ROWS, tmp_path, "train_dataset")
    assert [json.loads(line) for line in listed.read_text().splitlines()] == ROWS
    assert rows_file(OfTorch(), tmp_path, "train_dataset") == listed
    assert rows_file(tuple(ROWS), tmp_path, "train_dataset") == listed
    assert rows_file(ROWS[:1], tmp_path, "train_dataset") != listed
    plain = [{k: v for k, v in row.items() if k != "weight"} for row in ROWS]
    table = datasets.Dataset.from_list(plain)
    parquet = rows_file(table, tmp_path, "train_dataset")
    # A Dataset that was made anew has another fingerprint and the same content.
    assert rows_file(datasets.Dataset.from_list(plain), tmp_path, "train_dataset") == parquet
    assert datasets.Dataset.from_parquet(str(parquet), cache_dir=str(tmp_path / "c"))[:] == table[:]
    assert rows_file(table.select([1]), tmp_path, "train_dataset") != parquet
    pandas = pytest.importorskip("pandas")
    frame = rows_file(pandas.DataFrame(plain), tmp_path, "train_dataset")
    assert list(pandas.read_parquet(frame).columns) == ["prompt", "chosen", "rejected"]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_rows_with_images_are_parquet(tmp_path):
    image = Image.new("RGB", (4, 4), "red")
    file = rows_file([{"prompt": "a", "images": [image]}], tmp_path, "train_dataset")
    assert file.suffix == ".parquet"
    import pyarrow.parquet

    held = pyarrow.parquet.read_table(file).to_pylist()[0]["images"][0]
    assert held["bytes"][:4] == b"\x89PNG"


@pytest.mark.parametrize(
    "rows, message",
    [
        ([ROWS[0], "text"], r"train_dataset\[1\] is a str: expected a dict"),
        ([{"prompt": "a", "chosen": object()}], r"train_dataset\[0\], field 'chosen': a object"),
        (iter(ROWS), "cannot be read twice"),
        ({"train": ROWS}, "is a dict of train: hand over one split"),
    ],
)
def test_what_are_no_rows_is_told(tmp_path, rows, message):
    with pytest.raises(UserError, match=message):
        rows_file(rows, tmp_path, "train_dataset")
    assert not list(tmp_path.iterdir())


def test_a_stream_with_an_end_is_written_whole(tmp_path):
    stream = datasets.Dataset.from_list([{"prompt": "a"}, {"prompt": "b"}]).to_iterable_dataset()
    file = rows_file(stream, tmp_path, "train_dataset")
    import pyarrow.parquet

    assert pyarrow.parquet.read_table(file).to_pylist() == [{"prompt": "a"}, {"prompt": "b"}]


def test_names_are_told_from_objects_and_other_objects_are_refused(tmp_path):
    assert is_name("a") and is_name(Path("a")) and is_name(["a", "b"])
    assert not is_name([]) and not is_name(ROWS) and not is_name(3)
    with pytest.raises(UserError, match="model is a int: expected a model of transformers"):
        model_folder(3, tmp_path, "model")
    with pytest.raises(UserError, match="processing_class is a int"):
        tokenizer_folder(3, tmp_path)
