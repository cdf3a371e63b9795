"""`dpo-fast import`: what it writes, says and refuses."""

import json

import pytest
import yaml
from typer.testing import CliRunner

pytest.importorskip("pydantic")

from dpo_fast.cli.app import app
from dpo_fast.errors import UserError
from dpo_fast.training.config import load_config
from tests.support import ranks
from tests.support.models import write_model, write_pairs

THEIRS = {
    "model_name_or_path": "m",
    "dataset_name": "org/data",
    "full_determinism": True,
    "seed": 7,
}


def run(*words):
    return CliRunner().invoke(app, ["import", *map(str, words)])


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "dpo.json"
    path.write_text(json.dumps(THEIRS))
    return path


def test_it_writes_a_run_and_says_what_is_missing(tmp_path, file):
    out = tmp_path / "run.yaml"
    result = run("trl", file, "--out", out, "--nproc", 2)
    assert result.exit_code == 0
    assert "no counterpart: full_determinism=True" in result.stderr
    assert "made of 4 options (3 carried, 1 no counterpart)" in result.stdout
    config = load_config(str(out))
    assert config.train.seed == 7 and config.train.global_batch_size == 16
    assert "full_determinism=True" in out.read_text(), "the file says it as well"
    assert isinstance(run("trl", file, "--out", out).exception, UserError), "it overwrites nothing"


def test_without_out_the_configuration_is_all_of_standard_output(file):
    result = run("trl", file)
    assert yaml.safe_load(result.stdout)["model"]["path"] == "m"


def test_strict_fails_where_something_is_missing(tmp_path, file):
    result = run("trl", file, "--strict")
    assert "--strict: 1 without a counterpart: full_determinism" in str(result.exception)
    file.write_text(json.dumps(THEIRS | {"full_determinism": False}))
    assert run("trl", file, "--strict").exit_code == 0


def test_what_would_be_refused_is_written_and_told(tmp_path, file):
    file.write_text(
        json.dumps(
            THEIRS | {"torch_compile": True, "deepspeed": {"zero_optimization": {"stage": 3}}}
        )
    )
    out = tmp_path / "run.yaml"
    result = run("trl", file, "--out", out)
    assert "run.yaml is written, and would be refused: " in str(result.exception)
    assert "torch_compile" in str(result.exception) and out.exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["other", "{file}"], "other: choose from trl, llamafactory, openrlhf, axolotl"),
        (["trl", "{file}", "--method", "grpo"], "names no reward: add reward_funcs"),
        (["trl", "{file}", "--method", "x"], "choose from dpo, kto, cpo, orpo"),
        (["trl", "none.yaml"], "none.yaml: no such configuration file"),
    ],
)
def test_mistakes_are_told(file, words, said):
    result = run(*(word.format(file=file) for word in words))
    assert isinstance(result.exception, UserError) and said in str(result.exception)


@pytest.mark.processes
def test_what_is_imported_trains(tmp_path):
    """TRL's options of a run on a model and rows that are here, up to the end of it."""
    write_model(tmp_path / "model")
    write_pairs(tmp_path / "pairs.jsonl", 16)
    file = tmp_path / "trl.yaml"
    file.write_text(
        f"model_name_or_path: {tmp_path}/model\ndataset_name: {tmp_path}/pairs.jsonl\n"
        f"output_dir: {tmp_path}/run\nper_device_train_batch_size: 4\nmax_steps: 2\nbf16: false\n"
        "warmup_steps: 1\nmax_length: 64\ngradient_checkpointing: false\n"
    )
    out = tmp_path / "ours.yaml"
    assert run("trl", file, "--out", out, "--strict").exit_code == 0
    ranks.train([yaml.safe_load(out.read_text())])
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 2 and (tmp_path / "run" / "final").is_dir()
