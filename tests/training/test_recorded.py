"""The configuration that a run wrote leads to the same files from any folder, and after a move."""

from pathlib import Path

import pytest
import yaml

from dpo_fast.training.config import build_config
from dpo_fast.training.recorded import CONFIG, RUN_CONFIG, read_recorded, written

FILES = ("model/config.json", "held.jsonl", "pairs/a.jsonl", "runs/a/merged_base/config.json")


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with a run whose paths are relative, and this process in another folder."""
    project = tmp_path / "project ü"
    for file in FILES:
        (project / file).parent.mkdir(parents=True, exist_ok=True)
        (project / file).touch()
    monkeypatch.chdir(project)
    tree = {
        "model": {"path": "runs/a/merged_base", "tokenizer": "org/name"},
        "reference": {"path": "model"},
        "data": {"train": ["pairs/*.jsonl", {"path": "pairs:dev"}], "eval": "held.jsonl"},
        "train": {"output_dir": "runs/a"},
    }
    text = written(build_config(tree, "tree"))
    (project / "runs/a/checkpoint-1").mkdir()
    (project / "runs/a" / RUN_CONFIG).write_text(text, encoding="utf-8")
    (project / "runs/a/checkpoint-1" / CONFIG).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return project


def paths(tree: dict) -> list:
    data, reference = tree["data"], tree["reference"]
    train = [data["train"][0], data["train"][1]["path"]]
    own = [tree["model"]["path"], reference["path"], *train, data["eval"]]
    return [*own, tree["model"]["tokenizer"], tree["train"]["output_dir"]]


def expected(project: Path, run: Path) -> list[str]:
    names = ("model", "pairs/*.jsonl", "pairs:dev", "held.jsonl")
    inside = [str(project / name) for name in names]
    return [str(run / "merged_base"), *inside, "org/name", str(run)]


@pytest.mark.parametrize("name", [RUN_CONFIG, f"checkpoint-1/{CONFIG}"])
def test_paths_begin_where_the_run_began(project, name, monkeypatch):
    run = project / "runs/a"
    before = yaml.safe_load((run / name).read_text(encoding="utf-8"))
    assert paths(read_recorded(run / name)) == expected(project, run)
    moved = project.parent / "moved"
    run.rename(moved)
    assert paths(read_recorded(moved / name)) == expected(project, moved)
    moved.rename(run)
    monkeypatch.chdir(project)
    assert read_recorded(Path("runs/a") / name)["data"] == before["data"], "as they were given"
    elsewhere = project.rename(project.parent / "project 2")
    monkeypatch.chdir(elsewhere)
    found = read_recorded(Path("runs/a") / name)
    assert (found["data"], found["model"]["path"]) == (before["data"], before["model"]["path"])


def test_a_file_of_the_users_own_stays_as_it_is(project, tmp_path):
    file = tmp_path / "own.yaml"
    for text in ("model: {path: model}\n", "# Relative paths begin at [1]\nmodel: {path: model}\n"):
        file.write_text(text)
        assert read_recorded(file) == {"model": {"path": "model"}}
