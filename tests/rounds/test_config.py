"""The file of the three commands: `RoundsConfig`, and what is said of mistakes in it."""

from __future__ import annotations

import pytest

from dpo_fast.errors import UserError
from dpo_fast.rounds.config import RoundsConfig
from dpo_fast.training.config import build

TREE = {"output_dir": "runs/rounds", "model": {"path": "m"}, "sample": {"prompts": "p.jsonl"}}


def test_a_file_needs_a_folder_and_a_model():
    assert build(RoundsConfig, TREE, "file").sample.num_generations == 4
    with pytest.raises(UserError, match=r"file: output_dir is missing"):
        build(RoundsConfig, {"model": {"path": "m"}}, "file")


def test_a_mistake_names_the_key_of_this_file_and_not_of_a_run():
    with pytest.raises(UserError, match="unknown key samples; did you mean sample"):
        build(RoundsConfig, TREE | {"samples": {}}, "file")
    sample = {"prompts": "p.jsonl", "num_generation": 3}
    with pytest.raises(
        UserError, match=r"unknown key sample\.num_generation; did you mean num_generations"
    ):
        build(RoundsConfig, TREE | {"sample": sample}, "file")
    with pytest.raises(UserError, match=r"sample\.num_generations=0: input should be"):
        build(RoundsConfig, TREE | {"sample": {"prompts": "p", "num_generations": 0}}, "file")
