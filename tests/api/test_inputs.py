"""Objects as files: the same content under the same name, and errors that name row and field."""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from dpo_fast.api.inputs import changed_weight, is_name, model_folder, rows_file, tokenizer_folder
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
    pyarrow = pytest.importorskip("pyarrow")
    arrow = rows_file(pyarrow.Table.from_pylist(plain), tmp_path, "train_dataset")
    assert [json.loads(line) for line in arrow.read_text().splitlines()] == plain
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
    contents = ["text", [{"type": "image", "image": image}]]
    mixed = [{"prompt": [{"role": "user", "content": each} for each in contents]}]
    with pytest.raises(UserError, match="cannot mix list.*lists of parts, or name the images by"):
        rows_file(mixed, tmp_path, "train_dataset")


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


def test_a_frame_that_is_no_table_and_what_no_file_can_hold_are_told(tmp_path):
    pandas = pytest.importorskip("pandas")
    mixed = pandas.DataFrame({"prompt": ["a", [{"role": "user", "content": "b"}]]})
    with pytest.raises(UserError, match="train_dataset is no table of Arrow: .*list of dicts"):
        rows_file(mixed, tmp_path, "train_dataset")
    for row, message in (
        ({"prompt": "a\ud800"}, "field 'prompt': .*surrogates"),
        ({(1, 2): 3}, r"field \(1, 2\): keys must be"),
    ):
        with pytest.raises(UserError, match=rf"train_dataset\[0\], {message}"):
            rows_file([row], tmp_path, "train_dataset")
    assert not list(tmp_path.iterdir())


def test_an_adapter_on_weights_that_its_base_does_not_have_is_refused(tmp_path):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    from tests.support.models import write_model

    write_model(tmp_path / "model")

    def adapted(change=lambda base: base, **options):
        base = change(AutoModelForCausalLM.from_pretrained(tmp_path / "model", **options))
        return peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"]))

    def trained(base):
        with torch.no_grad():
            base.model.layers[1].self_attn.q_proj.weight[0, 0] += 1e-3
        return base

    # As it was loaded, rounded, and rounded and widened again.
    assert model_folder(adapted(), tmp_path, "model").is_dir()
    rounded = adapted(dtype=torch.bfloat16).get_base_model()
    assert changed_weight(rounded, str(tmp_path / "model")) is None
    assert changed_weight(rounded.float(), str(tmp_path / "model")) is None
    with pytest.raises(UserError, match=r"layers.1.self_attn.q_proj.weight differs.*peft_config"):
        model_folder(adapted(trained), tmp_path, "model")


def test_a_model_that_cannot_be_saved_is_told_with_the_reason(tmp_path):
    pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    from tests.support.models import write_model

    model = AutoModelForCausalLM.from_pretrained(write_model(tmp_path / "model"))
    model.generation_config.temperature = 0.3
    with pytest.raises(UserError, match="model cannot be saved.*temperature.*Mend it until"):
        model_folder(model, tmp_path, "model")
    with pytest.raises(UserError, match="model is the class AutoModelForCausalLM: expected"):
        model_folder(AutoModelForCausalLM, tmp_path, "model")
