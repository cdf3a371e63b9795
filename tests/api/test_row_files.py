"""Rows in memory as files: the same content under the same name, and errors that name row and field."""

import datetime
import decimal
import hashlib
import json
import uuid
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from dpo_fast.api.row_files import rows_file
from dpo_fast.data.config import DataConfig
from dpo_fast.data.dataset import load_examples
from dpo_fast.data.images.files import png
from dpo_fast.errors import UserError
from tests.support.image_rows import picture, write_qwen

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
    pyarrow = pytest.importorskip("pyarrow")
    arrow = rows_file(pyarrow.Table.from_pylist(plain), tmp_path, "train_dataset")
    assert [json.loads(line) for line in arrow.read_text().splitlines()] == plain
    pandas = pytest.importorskip("pandas")
    frame = rows_file(pandas.DataFrame(plain), tmp_path, "train_dataset")
    assert list(pandas.read_parquet(frame).columns) == ["prompt", "chosen", "rejected"]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_images_in_memory_are_the_images_of_files_in_every_container(tmp_path):
    """PIL images, opened files, bytes and paths, in parts and columns, beside plain texts and parts."""
    tokenizer = write_qwen(tmp_path / "qwen")
    content = png(picture(1))  # as pixels in memory are written
    file = tmp_path / "1.png"
    file.write_bytes(content)
    opened = Image.open(file)

    def pair(*said):
        asked = [{"role": "system", "content": "be brief"}, {"role": "user", "content": said[0]}]
        answers = ([{"role": "assistant", "content": each}] for each in ("cat", "dog"))
        return {"prompt": asked} | dict(zip(("chosen", "rejected"), answers))

    def ids(rows):
        path = rows_file(rows, tmp_path / "inputs", "train_dataset")
        config = DataConfig(train=str(path), cache_dir=str(tmp_path / "cache"), max_length=512)
        (row,) = load_examples(config, tokenizer, split="train")
        return row["prompt_ids"], [image["digest"] for image in row["images"]]

    waits = [{"type": "image"}, {"type": "text", "text": "what?"}]
    truth = ids([pair(waits) | {"images": [str(file)]}])
    row = {"images": [opened]}
    assert json.loads(rows_file([row], tmp_path, "rows").read_text()) == {"images": [str(file)]}
    values = [
        picture(1),
        opened,
        content,
        file,
        {"bytes": content, "path": None},
        {"path": str(file)},
    ]
    columns = [pair(waits) | {"images": [each]} for each in values]
    columns += [pair("what?") | {"image": opened}, pair("what?") | {"images": [opened]}]
    parts = [pair([{"type": "image", "image": each}, waits[1]]) for each in values[:4]]
    for row in columns + parts:
        assert ids([row]) == truth
    pandas = pytest.importorskip("pandas")
    text = [pair("what?") | {"images": [opened]}]
    table = datasets.Dataset.from_list(text)
    assert ids(pandas.DataFrame(columns[:1])) == ids(table) == truth
    assert ids(datasets.IterableDataset.from_generator(lambda: iter(columns[:1]))) == truth
    made = datasets.Dataset.from_list([{"n": 1}]).with_transform(
        lambda rows: {name: [text[0][name] for _ in rows["n"]] for name in text[0]}
    )
    assert ids(made) == truth
    assert truth[1] == [hashlib.sha256(content).digest()]
    file.write_bytes(content[: len(content) // 2])
    damaged = Image.open(file)
    damaged.filename = ""
    with pytest.raises(UserError, match=r"train_dataset\[0\], field 'images': .*truncated"):
        ids([pair(waits) | {"images": [damaged]}])


def test_a_transform_counts_and_values_without_a_word_in_json_are_written_as_they_read(tmp_path):
    table = datasets.Dataset.from_list([{"prompt": "a"}])
    shown = table.with_transform(lambda rows: {"prompt": [each + "!" for each in rows["prompt"]]})
    pandas = pytest.importorskip("pandas")
    when = datetime.datetime(2024, 1, 2, 3)
    row = {
        "when": when, "stamp": pandas.Timestamp(when), "none": pandas.NaT, "nothing": pandas.NA,
        "id": uuid.UUID(int=1), "price": decimal.Decimal("1.5"), "file": Path("a/b"),
    }  # fmt: skip
    told = {
        "when": "2024-01-02T03:00:00", "stamp": "2024-01-02T03:00:00", "none": None, "nothing": None,
        "id": str(row["id"]), "price": 1.5, "file": "a/b",
    }  # fmt: skip
    for rows, expected in ((shown, {"prompt": "a!"}), ([row], told)):
        assert json.loads(rows_file(rows, tmp_path, "train_dataset").read_text()) == expected
    # What Arrow has no type for is lines, too; NaN of a frame is what is not there.
    mixed = {"prompt": ["a", [{"role": "user", "content": "b"}]], "system": ["c", float("nan")]}
    for frame in (pandas.DataFrame(mixed), pandas.DataFrame(mixed, index=["x", "y"])):
        lines = rows_file(frame, tmp_path, "train_dataset").read_text().splitlines()
        assert [json.loads(line) for line in lines] == [
            {"prompt": mixed["prompt"][0], "system": "c"},
            {"prompt": mixed["prompt"][1], "system": None},
        ]


@pytest.mark.parametrize(
    "rows, message",
    [
        ([ROWS[0], "text"], r"train_dataset\[1\] is a str: expected a dict"),
        ([{"prompt": "a", "chosen": object()}], r"train_dataset\[0\], field 'chosen': a object"),
        (iter(ROWS), "cannot be read twice"),
        ({"train": ROWS}, "is a dict of train: hand over one split"),
        (lambda: iter(ROWS), "is a function: expected a Dataset, a DataFrame, a list of dicts"),
        (3, "is a int: expected"),
        ([], "has no rows: it is an empty list"),
        (datasets.Dataset.from_list(ROWS[:1]).select([]), "has no rows: it is an empty Dataset"),
        ([{"prompt": b"text"}], r"train_dataset\[0\], field 'prompt': a bytes that is no image"),
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


def test_what_no_file_can_hold_is_told(tmp_path):
    for row, message in (
        ({"prompt": "a\ud800"}, "field 'prompt': .*surrogates"),
        ({(1, 2): 3}, r"field \(1, 2\): keys must be"),
    ):
        with pytest.raises(UserError, match=rf"train_dataset\[0\], {message}"):
            rows_file([row], tmp_path, "train_dataset")
    assert not list(tmp_path.iterdir())
