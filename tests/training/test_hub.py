"""Models pushed to a server on this machine that speaks the hub's API, by the hub's own client."""

import importlib

import pytest
from typer.testing import CliRunner

from dpo_fast.cli.app import app
from dpo_fast.errors import UserError
from dpo_fast.training import hub
from tests.support.fake_hub import FakeHub

TOKEN = "hf_abcdefghijklmnopqrstuvwxyz"


@pytest.fixture
def server(monkeypatch):
    """The client sends to a server of ours."""
    server = FakeHub()
    constants = importlib.import_module("huggingface_hub.constants")
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def model(tmp_path):
    """A run's folder with a model, and things that no hub needs."""
    folder = tmp_path / "my-run" / "final"
    (folder / "engine").mkdir(parents=True)
    (folder / "curves").mkdir()
    contents = {
        "config.json": b"{}",
        "README.md": b"---\nlibrary_name: transformers\n---\n# card\n",
        "model.safetensors": bytes(range(256)) * 8,
        "curves/loss.svg": b"<svg/>",
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    for name in ("engine/zero.pt", "state.json", ".hidden"):
        (folder / name).write_bytes(b"private")
    return folder, contents


def test_a_folder_is_pushed_whole_and_nothing_else(server, model):
    folder, contents = model
    address = hub.push(folder, None, private=True)
    assert server.repos == {"me/my-run": True} and address == f"{server.address}/me/my-run"
    assert server.files["me/my-run", "main"] == contents
    assert server.tokens - {None} == {f"Bearer {TOKEN}"}  # objects go to addresses that are signed
    assert hub.push(folder, "me/my-run") == address  # a second time


def test_a_branch_of_an_organisation(server, model):
    folder, contents = model
    address = hub.push(folder, "team/model", revision="v2")
    assert server.branches["team/model"] == {"main", "v2"}
    assert server.files == {("team/model", "v2"): contents}
    assert address.endswith("/team/model/tree/v2")


@pytest.mark.parametrize("fails", ["/api/repos/create", "preupload", "/objects/", "/commit/"])
def test_a_push_that_fails_loses_nothing_and_says_how_to_try_again(server, model, fails):
    folder, contents = model
    server.fails = fails
    with pytest.raises(UserError) as told:
        hub.push(folder, "team/model", private=True, revision="v2")
    command = f"dpo-fast push {folder} team/model --private --revision v2"
    assert command in str(told.value) and TOKEN not in str(told.value)
    assert all((folder / name).read_bytes() == content for name, content in contents.items())
    server.fails = None
    shown = CliRunner().invoke(app, command.split()[1:])
    assert shown.exit_code == 0 and shown.stdout.strip().endswith("/team/model/tree/v2")
    assert server.files["team/model", "v2"] == contents


def test_folders_and_names_that_cannot_be_pushed(model, tmp_path):
    folder, _ = model
    with pytest.raises(UserError, match="no such folder"):
        hub.push(tmp_path / "none", None)
    with pytest.raises(UserError, match=r"holds no model .*: name .*final"):
        hub.push(folder.parent, None)
    for repo in ("a/b/c", "two words", "-x/y", "me/model@v1"):
        with pytest.raises(UserError, match=f"repository={repo}"):
            hub.push(folder, repo)


def test_a_run_folder_means_its_model(server, model):
    folder, contents = model
    (folder.parent / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    shown = CliRunner().invoke(app, ["push", str(folder.parent)])
    assert shown.exit_code == 0, shown.output
    assert server.files["me/my-run", "main"] == contents
