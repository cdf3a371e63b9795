"""Splits of folders: the same files as `datasets` takes, or an error that names the splits."""

import json
from pathlib import Path

import datasets
import pytest
from datasets.data_files import DataFilesDict, get_data_patterns

from dpo_fast.data.sources import FileSource, resolve
from dpo_fast.errors import UserError

ROW = json.dumps({"prompt": "Q", "chosen": "a", "rejected": "b"}) + "\n"


@pytest.fixture
def folder(tmp_path):
    """folder(*names): a folder `hub` with a one-row file under each of these names."""

    def make(*names: str) -> Path:
        for name in names:
            path = tmp_path / "hub" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if name.endswith(".parquet"):
                datasets.Dataset.from_list([json.loads(ROW)]).to_parquet(str(path))
            else:
                path.write_text(ROW)
        return tmp_path / "hub"

    return make


def names(name, role="train") -> list[str]:
    """The file names that a name stands for."""
    sources = resolve([str(name)], role)
    assert all(isinstance(source, FileSource) for source in sources)
    return [source.path.name for source in sources]


def refusal(name, role="train") -> str:
    with pytest.raises(UserError) as caught:
        resolve([str(name)], role)
    return str(caught.value)


LAYOUTS = {
    "shards": ("data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet",
               "data/test-00000-of-00001.parquet"),
    "files": ("train.jsonl", "test.jsonl", "validation.jsonl"),
    "words": ("pairs-training-1.jsonl", "pairs_dev.jsonl", "pairs.eval.jsonl"),
    "folders": ("train/a.jsonl", "train/b.jsonl", "test/a.jsonl", "val/x/a.jsonl"),
    "custom": ("data/train_sft-00000-of-00001.parquet", "data/train-00000-of-00001.parquet",
               "data/test_prefs-00000-of-00001.parquet"),
    "plain": ("a.jsonl", "b.jsonl", "contest.jsonl", "trained.jsonl", "deep/c.jsonl"),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_has_the_splits_that_datasets_sees(folder, layout):
    path = folder(*LAYOUTS[layout])
    (path / ".cache").mkdir()
    (path / ".cache" / "train.jsonl").write_text(ROW)
    patterns = get_data_patterns(str(path))
    expected = DataFilesDict.from_patterns(patterns, base_path=str(path))
    assert "train" in expected
    assert names(path) == [Path(file).name for file in sorted(expected["train"])]
    if layout == "plain":
        assert "no splits; leave out 'test'" in refusal(f"{path}:test")
        return
    for split, files in expected.items():
        assert names(f"{path}:{split}") == [Path(file).name for file in sorted(files)]
    told = refusal(f"{path}:nowhere")
    assert "no split 'nowhere'; it has " in told
    assert all(str(split) in told for split in expected)
    assert f"Name one as in {path}:" in told
    assert "data.eval may mean any of its splits" in refusal(path, "eval")


@pytest.mark.parametrize("files", [("test.jsonl",), ("dev.jsonl", "test.jsonl"),
                                   ("data/test-00000-of-00001.parquet",)])  # fmt: skip
def test_a_folder_without_a_train_split_is_not_trained_on(folder, files):
    path = folder(*files)
    assert "data.train may mean any of its splits" in refusal(path)
    assert "test" in refusal(path)
    assert names(f"{path}:test") == [Path(files[-1]).name]


def test_a_split_that_stands_alone(folder):
    assert names(folder("data/test-00000-of-00001.parquet"), "eval") == [
        "test-00000-of-00001.parquet"
    ]


def test_shards_of_no_split_are_the_data(folder):
    path = folder("prefs-00000-of-00002.parquet", "prefs-00001-of-00002.parquet")
    assert len(names(path)) == 2


def test_a_file_of_no_split_is_not_passed_over(folder):
    path = folder("train.jsonl", "more.jsonl", "stats.json")
    assert "more.jsonl belongs to none of its splits (train)" in refusal(path)
    assert names(f"{path}:train") == ["train.jsonl"]
    (path / "more.jsonl").unlink()
    assert names(path) == ["train.jsonl"], "a file of another kind stands beside the data"


def test_copies_of_a_file_are_not_read_twice(folder):
    path = folder("train.jsonl", "train.parquet", "test.jsonl", "b/rows.jsonl", "b/rows.jsonl.gz")
    assert "train.jsonl and train.parquet differ in their suffix alone" in refusal(f"{path}:train")
    assert "rows.jsonl and rows.jsonl.gz differ" in refusal(path / "b")
    assert names(f"{path}:test") == ["test.jsonl"]


def test_a_file_of_two_splits(folder):
    assert "train-test.jsonl may be of the splits train or test" in refusal(
        folder("train-test.jsonl", "test.jsonl")
    )


README = """---
license: mit
configs:
- config_name: default
  data_files:
  - split: train_prefs
    path: prefs/a-*
  - split: test_prefs
    path: [prefs/b.jsonl]
---
# Preferences
"""


def test_a_readme_describes_the_splits(folder):
    path = folder("prefs/a-1.jsonl", "prefs/a-2.jsonl", "prefs/b.jsonl")
    (path / "README.md").write_text(README)
    told = refusal(path)
    assert "may mean any of its splits train_prefs, test_prefs. Name one as in" in told
    assert names(f"{path}:train_prefs") == ["a-1.jsonl", "a-2.jsonl"]
    (path / "README.md").write_text(README.replace("default", "one") + "no front matter\n")
    assert names(f"{path}:test_prefs") == ["b.jsonl"]
    two = README.replace("default", "one").replace(
        "---\n# P", "- config_name: two\n  data_files: prefs/*\n---\n# P"
    )
    (path / "README.md").write_text(two)
    assert "describes several data sets (one, two)" in refusal(path)
    (path / "README.md").write_text("---\nconfigs: [\n---\n")
    assert len(names(path)) == 3


def test_a_saved_folder_of_splits(tmp_path):
    data = datasets.Dataset.from_list([json.loads(ROW)])
    datasets.DatasetDict(dev=data, test=data).save_to_disk(str(tmp_path / "saved"))
    assert "data.train may mean any of its splits dev, test" in refusal(tmp_path / "saved")
    assert str(resolve([f"{tmp_path}/saved:dev"])[0]) == f"{tmp_path}/saved:dev"


@pytest.mark.parametrize("pattern", ["../*.jsonl", "prefs/../../x", "a**b/*", "''"])
def test_a_readme_does_not_lead_out_of_its_folder(folder, pattern):
    path = folder("prefs/a-1.jsonl")
    (path.parent / "outside.jsonl").write_text(ROW)
    (path / "README.md").write_text(f"---\nconfigs:\n- data_files: [prefs/*, {pattern}]\n---\n")
    assert "README.md names" in refusal(path) and "name the files yourself" in refusal(path)


@pytest.mark.parametrize("splits", ["[1]", "[[]]", "{", "[" * 5000, "3", "null"])
def test_splits_of_a_saved_folder_that_are_none(tmp_path, splits):
    (tmp_path / "dataset_dict.json").write_text(f'{{"splits": {splits}}}')
    assert "not a readable datasets folder" in refusal(tmp_path)
