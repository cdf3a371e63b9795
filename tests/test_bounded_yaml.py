"""YAML as people write it: numbers, environment variables, line ends; and back from what we wrote."""

import math
import os

import pytest
import yaml

from dpo_fast import bounded_yaml
from dpo_fast.errors import UserError
from dpo_fast.training.config import build_config
from dpo_fast.training.config_file import read_tree

NUMBERS = {
    "5e-6": 5e-6,
    "1e3": 1000.0,
    "1.5e3": 1500.0,
    "-2E+1": -20.0,
    ".1": 0.1,
    "1.": 1.0,
    "-.inf": -math.inf,
    "010": 10,
    "-7": -7,
    "1_000": 1000,
    "0x1f": 31,
    "0o17": 15,
    "0b101": 5,
}
TEXTS = ["1:30", "1e", "e5", "12e4567", "1e5x", "0o9", "0x", "1.2.3", "--1", "2024-1", "v1.2", "_1"]


@pytest.mark.parametrize("text", NUMBERS)
def test_a_number_is_one_wherever_it_stands(text):
    """PyYAML alone takes 1e-6 for a text, which a field of numbers mends and a free mapping does not."""
    found = bounded_yaml.load(f"a: {{b: [{text}]}}")["a"]["b"][0]
    assert found == NUMBERS[text] and type(found) is type(NUMBERS[text])


@pytest.mark.parametrize("text", [*TEXTS, *NUMBERS, "yes", "null", "ä b", "", "a: b", "2024-01-01"])
def test_a_text_comes_back_as_it_was_written(text):
    assert bounded_yaml.load(bounded_yaml.dump({"name": text})) == {"name": text}
    if text in TEXTS:
        assert bounded_yaml.load(f"name: {text}") == {"name": text}


def test_options_of_a_schedule_are_numbers():
    tree = bounded_yaml.load(
        "model: {path: m}\ndata: {train: t.jsonl}\n"
        "train:\n  {output_dir: o, learning_rate: 1e-5, lr_scheduler_type: cosine_with_min_lr,\n"
        "   lr_scheduler_kwargs: {min_lr: 1e-6}}\n"
        "parallel: {zero_stage: 2, deepspeed: {zero_optimization: {reduce_bucket_size: 5e8}}}\n"
    )
    config = build_config(tree, "case")
    assert config.train.lr_scheduler_kwargs == {"min_lr": 1e-6}
    assert config.parallel.deepspeed["zero_optimization"]["reduce_bucket_size"] == 500_000_000.0


@pytest.mark.parametrize("value", ["yes", "true", "on"])
def test_yes_is_no_number(value):
    """Not of a choice of numbers either: true equals 1."""
    tree = bounded_yaml.load(
        "model: {path: m}\ndata: {train: t.jsonl}\ntrain: {output_dir: o}\n"
        f"parallel: {{zero_stage: {value}}}"
    )
    with pytest.raises(UserError, match="parallel.zero_stage=true: expected a number"):
        build_config(tree, "case")


def test_a_key_that_stands_twice_is_told_with_its_line():
    with pytest.raises(yaml.YAMLError, match="'max_steps' stands twice(.|\n)*line 3"):
        bounded_yaml.load("train:\n  max_steps: 3\n  max_steps: 4\n")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("begin", ["", "\ufeff"])
def test_line_ends_and_marks_of_other_systems(tmp_path, begin, end):
    lines = ["base: &base", "  seed: 3", "train:", "  <<: *base", "  output_dir: é è"]
    (tmp_path / "run.yaml").write_bytes((begin + end.join(lines)).encode())
    assert read_tree(str(tmp_path / "run.yaml"))["train"] == {"seed": 3, "output_dir": "é è"}


def test_environment_variables_are_those_of_paths_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("DATA", "/data")
    monkeypatch.delenv("NOT_SET", raising=False)
    file = tmp_path / "run.yaml"
    file.write_text(
        "data:\n  train: [$DATA/a.jsonl, {path: '${DATA}/b.jsonl', weight: 1}]\n  eval: a$5.jsonl\n"
        "train: {output_dir: runs/$DATA-1}\nlog: {notes: costs $DATA}\n"
    )
    tree = read_tree(str(file), ["reference.cache_dir=$DATA/refs"])
    first, second = tree["data"]["train"]
    assert (first, second["path"]) == ("/data/a.jsonl", "/data/b.jsonl")
    assert tree["data"]["eval"] == "a$5.jsonl" and tree["log"]["notes"] == "costs $DATA"
    assert tree["train"]["output_dir"] == "runs//data-1"
    assert tree["reference"]["cache_dir"] == "/data/refs"
    with pytest.raises(
        UserError, match="output_dir=.NOT_SET/x: the environment variable NOT_SET is"
    ):
        read_tree(str(file), ["train.output_dir=$NOT_SET/x"])
    monkeypatch.chdir(tmp_path)
    os.mkdir("$NOT_SET")  # a folder that is really called so
    assert read_tree(str(file), ["train.output_dir=$NOT_SET"])["train"]["output_dir"] == "$NOT_SET"
