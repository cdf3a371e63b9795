"""`dpo-fast export`: its words, and mistakes in them. What it writes: training/test_checkpoint_run.py."""

import pytest

pytest.importorskip("transformers")

from dpo_fast.cli.export import export, split
from dpo_fast.errors import UserError


def test_the_folder_may_be_left_out_before_overrides():
    assert split(None, None) == (None, [])
    assert split("out", ["train.merge_lora=true"]) == ("out", ["train.merge_lora=true"])
    assert split("train.merge_lora=true", ["model.path=x"]) == (
        None,
        ["train.merge_lora=true", "model.path=x"],
    )
    assert split("a=b", None) == ("a=b", []), "a folder may be called so"


def test_what_is_no_checkpoint_is_told(tmp_path):
    with pytest.raises(UserError, match="no-such: no such folder; expected a checkpoint"):
        export(str(tmp_path / "no-such"))
    with pytest.raises(UserError, match="is no checkpoint: expected a folder checkpoint-N with"):
        export(str(tmp_path))
    (tmp_path / "config.yaml").write_text("{}")
    with pytest.raises(UserError, match="or the output_dir of a run that has one"):
        export(str(tmp_path))
