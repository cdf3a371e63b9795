"""Malformed configurations end in one message of a few lines, soon, and in little memory."""

import random
import time
from datetime import date

import pytest

from dpo_fast.bounded_yaml import MOST_VALUES, load
from dpo_fast.errors import LONGEST, UserError
from dpo_fast.training.config import RunConfig, load_config
from dpo_fast.training.config_types import check_types
from tests.support import malformed
from tests.support.faults import SLOW
from tests.support.memory import grown

TREE = {"model": {"path": "m"}, "data": {"train": "x.jsonl"}, "train": {"output_dir": "o"}}


def told(file, content: bytes | str, *overrides: str) -> str:
    """The message about a configuration; empty if it is sound."""
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    try:
        load_config(str(file), overrides)
    except UserError as error:
        return str(error)
    return ""


def check(file, count: int, seed: int) -> dict[bool, int]:
    """Counts of sound (True) and refused ones among so many configurations that are drawn."""
    counts = {True: 0, False: 0}
    for index, content in enumerate(malformed.cases(malformed.bad_config, count, seed)):
        start = time.monotonic()
        message = told(file, content)
        assert len(message) <= LONGEST + 100, index
        assert message.isprintable() or "\n" in message, (index, message)
        assert time.monotonic() - start < 20, index
        counts[not message] += 1
    return counts


def test_a_sample_of_malformed_ones(tmp_path):
    with grown(mib=200):
        assert check(tmp_path / "run.yaml", 100, seed=1)[False] > 75


@pytest.mark.slow
@SLOW
def test_malformed_ones_by_the_thousand(tmp_path):
    with grown(mib=300):
        counts = check(tmp_path / "run.yaml", 4000, seed=2)
    print(f"configurations: {counts[False]} of {sum(counts.values())} refused")


FAULTS = {
    "a date that is none": ("{model: {path: 2020-99-99}}", "line 1, column 16"),
    "an integer that is none": ("{train: {seed: !!int abc}}", "'abc' is not a value of type int"),
    "a mapping that is none": ("{train: !!map [1]}", "expected a mapping"),
    "deep": ("{model: " + "[" * 3000 + "]" * 3000 + "}", "more than 50 levels"),
    "deep and open": ("model: " + "{a: " * 3000, "more than 50 levels"),
    "an alias in itself": ("model: &a [*a]", "an alias of what it stands in"),
    "a key twice": ("model: {path: a}\ndata: {}\nmodel: {}", "'model' stands twice"),
    "a key twice, below": ("model:\n  path: a\n  path: b", "line 3, column 3"),
    "half of a pair": ('model: {path: "\\ud800"}', "model.path='\\ud800' has half of a surrogate"),
    "NUL": ('train: {output_dir: "a\\0b"}', "train.output_dir='a\\x00b' has a NUL character"),
    "a long name": (f"train: {{output_dir: {'x' * 300}}}", "has at most 240 bytes"),
    "a long path": (f"data: {{train: [{'x/' * 3000}y]}}", "a path 3800"),
    "true": ("train: {max_steps: true}", "train.max_steps=true: expected a number"),
    "true among others": ("loss: {weights: [1, true]}", "loss.weights.1=true: expected a number"),
    "true deeper": ("data: {train: [{path: a, weight: yes}]}", "data.train.0.weight=true"),
    "1": ("data: {streaming: 1}", "data.streaming=1: expected true or false"),
    "1, or text": ("train: {resume_from_checkpoint: 1}", "=1: expected true or false"),
    "1.0e+30": ("train: {global_batch_size: 1.0e+30}", "train.global_batch_size=1e+30 is out of"),
    "a billion": ("train: {global_batch_size: 1000000000}", "equal to 1048576"),
    "a million processes": (
        "data: {train: a, workers: 1000000}",
        "data.workers=1000000 is more than",
    ),
    "of 400 digits": (f"train: {{learning_rate: {'9' * 400}}}", "train.learning_rate=9999"),
    "escape": ('model: "\\e]0;x\\a"', "\\x1b]0;x\\x07"),
    "not UTF-8": (b"model: \xff", "run.yaml cannot be read"),
    "large": ("model: " + "x" * (1 << 20), "1,048,576 is the most"),
}


@pytest.mark.parametrize("what", FAULTS)
def test_a_fault_is_told_with_its_place(tmp_path, what):
    content, message = FAULTS[what]
    assert message in told(tmp_path / "run.yaml", content)
    assert len(told(tmp_path / "run.yaml", content)) < 1200


def test_an_alias_bomb(tmp_path):
    bomb = malformed.bomb()
    assert len(bomb) < 700
    with grown(mib=50):
        message = told(tmp_path / "run.yaml", bomb)
    assert f"stands for more than {MOST_VALUES:,} values" in message and len(message) < 1000
    assert load("a: &a [1, 2]\nb: [*a, *a]") == {"a": [1, 2], "b": [[1, 2], [1, 2]]}


def test_a_file_without_end():
    with pytest.raises(UserError, match="/dev/zero"):
        load_config("/dev/zero")


def test_a_long_value_is_cut(tmp_path):
    message = told(tmp_path / "run.yaml", f"model: {{path: a, dtype: {'x' * 50_000}}}")
    assert "model.dtype='xxx" in message and "characters ..." in message and len(message) < 1000


def test_many_faults_are_a_few(tmp_path):
    content = "model: {" + ", ".join(f"key{index}: 1" for index in range(500)) + "}"
    message = told(tmp_path / "run.yaml", content)
    assert "model.key8" in message and "model.key9" not in message


def test_overrides_go_the_same_way(tmp_path):
    assert "expected a number" in told(tmp_path / "a", str(TREE), "train.max_steps=true")
    assert "stands twice" in told(tmp_path / "a", str(TREE), "model={a: 1, a: 2}")
    assert "more than 50 levels" in told(tmp_path / "a", str(TREE), "model=" + "[" * 500)


SOUND = [
    ("train", "learning_rate", 1),
    ("train", "learning_rate", "1e-6"),
    ("train", "num_train_epochs", 3),
    ("train", "max_steps", 3.0),
    ("train", "seed", 2**32 - 1),
    ("train", "resume_from_checkpoint", None),
    ("train", "resume_from_checkpoint", True),
    ("train", "resume_from_checkpoint", "runs/a/checkpoint-1"),
    ("data", "apply_chat_template", False),
    ("data", "chat_template_kwargs", {"enable_thinking": True, "budget": 1, "deep": {"a": [True, 2]}}),
    ("model", "gradient_checkpointing", None),
    ("model", "checkpoint_layers", [0, 1]),
    ("parallel", "deepspeed", {"a": True, "b": {"c": 1.5}}),
]  # fmt: skip


@pytest.mark.parametrize(("section", "key", "value"), SOUND)
def test_what_is_sound_stays_so(section, key, value):
    tree = {**TREE, section: {**TREE.get(section, {}), key: value}}
    check_types(tree, RunConfig, "run.yaml")
    RunConfig.model_validate(tree)


def test_values_that_are_no_configuration():
    with pytest.raises(UserError, match=r"data.train is a builtins.object; .* save_to_disk"):
        check_types({**TREE, "data": {"train": object()}}, RunConfig, "run.yaml")
    check_types(
        {**TREE, "data": {"train": date(2020, 1, 1)}}, RunConfig, "run.yaml"
    )  # pydantic's to tell


def test_the_generator_draws_the_same_again():
    draws = [malformed.bad_config(random.Random(7)) for _ in range(2)]
    assert draws[0] == draws[1]
