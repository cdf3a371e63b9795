"""Models of the hub by revision, from a cache on disk and without a network."""

import json
import os
import subprocess
import sys

import pytest
import yaml

pytest.importorskip("transformers")

from dpo_fast.errors import UserError
from dpo_fast.models.checkpoint import base_of, is_folder
from dpo_fast.models.config import ModelSection
from dpo_fast.models.hub import source, split_revision
from dpo_fast.references import ReferenceSection
from dpo_fast.training.config import build_config
from tests.support.models import run_tree, write_model, write_pairs
from tests.support.paths import ENVIRONMENT

COMMITS = {"main": "a" * 40, "v1": "b" * 40}


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("org/name", ("org/name", None)),
        ("org/name@v1.0", ("org/name", "v1.0")),
        ("gpt2@refs/pr/3", ("gpt2", "refs/pr/3")),
        ("/data/me@home/model", ("/data/me@home/model", None)),
        ("./me@home", ("./me@home", None)),
    ],
)
def test_what_is_a_revision(path, expected):
    assert split_revision(path) == expected


def test_names_that_no_folder_can_have():
    long = "x" * 3000
    assert split_revision(f"org/name@{long}") == ("org/name", long)
    assert ModelSection(path="org/name", revision=long).path == f"org/name@{long}"


def test_the_home_of_nobody_is_a_name_like_any_other(tmp_path):
    tree = run_tree(tmp_path)
    tree["train"]["output_dir"] = "~nobody-of-this-name/run"
    assert build_config(tree, "tree").train.output_dir == "~nobody-of-this-name/run"
    with pytest.raises(UserError, match="no such folder"):
        is_folder("~nobody-of-this-name/model", "model.path")


def test_a_folder_with_an_at_sign_is_a_folder(tmp_path, monkeypatch):
    (tmp_path / "model@v1").mkdir()
    monkeypatch.chdir(tmp_path)
    assert source("model@v1") == {"pretrained_model_name_or_path": "model@v1"}
    assert source("model@v2") == {"pretrained_model_name_or_path": "model", "revision": "v2"}
    assert not is_folder("org/name@refs/pr/1", "model.path")
    with pytest.raises(UserError, match="no such folder"):
        is_folder("a/b/c", "model.path")


def test_the_option_is_noted_in_the_path(tmp_path):
    assert ModelSection(path="org/name", revision="v1").path == "org/name@v1"
    reference = ReferenceSection(path="org/name", revision="main")
    assert reference.path == "org/name@main" and reference.revision is None
    tree = run_tree(tmp_path)
    tree["model"] = {"path": "org/name", "revision": "v1"}
    resolved = build_config(tree, "tree").resolved()
    assert resolved["model"]["path"] == "org/name@v1"
    assert build_config(resolved, "resolved").resolved() == resolved


WRONG = {  # the section: what is said
    "a folder": ({"path": "{tmp}"}, r"model.path=.* is a folder; revisions are of hub ids"),
    "two": ({"path": "org/name@v2"}, "names a revision, and so does model.revision=v1; keep one"),
    "no hub id": ({"path": "a/b/c"}, "expected a branch, a tag or a commit of a hub id"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_revision_of_nothing_is_refused(tmp_path, wrong):
    section, message = WRONG[wrong]
    section = {name: value.format(tmp=tmp_path) for name, value in section.items()}
    with pytest.raises(ValueError, match=message):
        ModelSection.model_validate(section | {"revision": "v1"})
    with pytest.raises(
        ValueError, match=r"reference.revision=v1 is of reference.path, which is not set"
    ):
        ReferenceSection(revision="v1")


def test_the_base_of_an_adapter_has_the_revision_that_it_names(tmp_path):
    config = {"base_model_name_or_path": "org/name", "revision": "v1"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert base_of(str(tmp_path)) == "org/name@v1"
    (tmp_path / "base").mkdir()
    config["base_model_name_or_path"] = str(tmp_path / "base")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert base_of(str(tmp_path)) == str(tmp_path / "base")


TRAIN = """
import sys
from dpo_fast.errors import UserError
from dpo_fast.training.config import load_config
from dpo_fast.training.loop import train

try:
    train(load_config(sys.argv[1], ["model.revision=v7"]))
except UserError as error:
    print("REFUSED", error)
train(load_config(sys.argv[1], ["model.revision=v1"]))
"""


@pytest.mark.processes
def test_a_run_takes_the_revisions_that_it_names(tmp_path):
    repository = tmp_path / "cache" / "models--org--tiny"
    for seed, (name, commit) in enumerate(COMMITS.items()):
        write_model(repository / "snapshots" / commit, seed=seed)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / name).write_text(commit)
    write_pairs(tmp_path / "pairs.jsonl", 8)
    tree = run_tree(tmp_path, max_steps=1, micro_batch_size=2)
    tree["model"] = {"path": "org/tiny", "lora": {"r": 2, "alpha": 4}, "dtype": "fp32"}
    tree["reference"] = {"path": "org/tiny", "revision": "main"}
    tree["train"]["output_dir"] = str(tmp_path / "out")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, str(tmp_path / "run.yaml")],
        env=ENVIRONMENT | {"HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    (refused,) = [line for line in done.stdout.splitlines() if line.startswith("REFUSED")]
    assert "model.path=org/tiny@v7: the model cannot be loaded" in refused
    assert f"In the cache: main, v1, {COMMITS['main']}, {COMMITS['v1']}" in refused
    assert "step 0: loss" not in done.stdout, "two revisions are two models"
    written = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert written["model"]["path"] == "org/tiny@v1"
    (manifest,) = (tmp_path / "out" / "reference").glob("train-*/_manifest.json")
    assert json.loads(manifest.read_text())["model"] == f"org/tiny@{COMMITS['main']}"
    adapter = json.loads((tmp_path / "out" / "final" / "adapter_config.json").read_text())
    assert (adapter["base_model_name_or_path"], adapter["revision"]) == ("org/tiny", "v1")
    assert os.path.exists(tmp_path / "out" / "final" / "tokenizer.json")
