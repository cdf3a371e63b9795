"""An option of a run that is written with dashes, as other trainers have it: what it is called here."""

import sys

import pytest

pytest.importorskip("transformers")

from dpo_fast.cli import app
from dpo_fast.cli.commands import meant


def told(capsys, monkeypatch, *words: str) -> str:
    monkeypatch.setattr(sys, "argv", ["dpo-fast", *words])
    with pytest.raises(SystemExit) as ended:
        app.main()
    assert ended.value.code == 2
    error = capsys.readouterr().err
    return " ".join(error.replace("│", " ").split())


@pytest.mark.parametrize(
    "words, key",
    [
        (["--max_steps", "3"], "train.max_steps=3"),
        (["--max-steps=3"], "train.max_steps=3"),
        (["--learning_rat", "1e-6"], "train.learning_rate=1e-6"),
        (["--beta", "0.2", "--quiet"], "loss.beta=0.2"),
        (["--seed", "4"], "data.seed=4 or train.seed=4"),
        (["--train.max_steps", "3"], "train.max_steps=3"),
        (["--gradient_checkpointing", "--quiet"], "model.gradient_checkpointing=VALUE"),
    ],
)
def test_options_of_a_run_are_named(capsys, monkeypatch, words, key):
    message = told(capsys, monkeypatch, "train", "run.yaml", *words)
    assert f"Options of a run have no dashes: {key}" in message


@pytest.mark.parametrize(
    "command, option, key",
    [
        ("sample", "--temperature", "sample.temperature=1"),
        ("sample", "--output-dir", "output_dir=1"),
        ("iterate", "--learning_rate", "train.learning_rate=1"),
        ("judge", "--beta", "judge.beta=1"),
        ("train", "--temperature", "generate.temperature=1"),
        ("train", "--num_generations", None),
    ],
)
def test_rounds_have_options_of_their_own(command, option, key):
    told = meant(option, [f"{option}=1"], command)
    assert told is None if key is None else told.endswith(f": {key}")


@pytest.mark.parametrize(
    "words",
    [["train", "run.yaml", "--foo", "3"], ["init", "--max_steps", "3"], ["train", "--drry-run"]],
)
def test_others_are_told_as_ever(capsys, monkeypatch, words):
    message = told(capsys, monkeypatch, *words)
    assert "No such option: --" in message and "no dashes" not in message


def test_a_value_is_what_stands_behind():
    assert meant("--max_steps", ["--max_steps=7"]).endswith("train.max_steps=7")
    assert meant("--max_steps", ["--max_steps"]).endswith("train.max_steps=VALUE")
    assert meant("--nothing", []) is None
