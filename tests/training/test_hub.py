"""Models pushed to a server on this machine that speaks the hub's API, by the hub's own client."""

import importlib
import time

import pytest
from typer.testing import CliRunner

from dpo_fast.cli.app import app
from dpo_fast.cli.push import push_the_end
from dpo_fast.errors import UserError
from dpo_fast.training import hub
from dpo_fast.training.config import build_config
from tests.support.fake_hub import TOKEN, fake_hub
from tests.support.models import run_tree


@pytest.fixture
def server(monkeypatch):
    """The client sends to a server of ours."""
    with fake_hub(monkeypatch) as server:
        yield server


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
    for name in ("engine/zero.pt", "rank-0.pt", "zero_to_fp32.py", "state.json", ".hidden"):
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


@pytest.mark.parametrize("place", ["/api/repos/create", "preupload", "info/lfs", "/commit/"])
@pytest.mark.parametrize("status", [429, 500, "drop"])
def test_what_fails_for_a_moment_is_tried_again(server, model, monkeypatch, place, status):
    folder, contents = model
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    server.fails, server.status, server.times = place, status, 2
    hub.push(folder, "team/model")
    assert server.files["team/model", "main"] == contents and server.times == 0


@pytest.mark.parametrize("place", ["/api/repos/create", "/commit/"])
def test_a_hub_that_says_nothing_is_an_error(server, model, monkeypatch, place):
    from huggingface_hub import get_session

    folder, _ = model
    monkeypatch.setattr(hub, "SILENCE", 0.5)
    server.fails, server.status = place, "silent"
    with pytest.raises(UserError, match="the hub has not answered for 0.5 seconds"):
        hub.push(folder, "team/model")
    assert get_session().timeout.read is None, "others have the client as it was"


def test_after_a_lost_connection_silence_is_limited_too(monkeypatch):
    from huggingface_hub import close_session, get_session

    monkeypatch.setattr(hub, "SILENCE", 0.5)
    with hub.limited_silence():
        close_session()  # as its client does then
        assert get_session().timeout.read == 0.5
    assert get_session().timeout.read is None


CARD_ERROR = {"errors": [{"message": '"license" must be one of [mit]'}], "warnings": []}


@pytest.mark.parametrize(
    ("place", "status", "fault", "words"),
    [
        ("preupload", 401, "Invalid token", "401: Invalid token (the token is not accepted"),
        ("/commit/", 403, "No rights", "403: No rights (the token may not write there"),
        ("preupload", 404, "Revision not found", "404: Revision not found"),
        ("info/lfs", 501, "No LFS here", "501: No LFS here"),
        ("validate-yaml", 400, CARD_ERROR, 'README.md. - "license" must be one of [mit]'),
    ],
)
def test_the_reason_is_in_the_hubs_own_words(server, model, place, status, fault, words):
    folder, _ = model
    server.fails, server.status, server.fault = place, status, fault
    with pytest.raises(UserError) as told:
        hub.push(folder, "team/model")
    assert words in str(told.value)


def test_what_is_to_be_private_does_not_go_where_all_can_see_it(server, model):
    folder, _ = model
    server.repos["me/open"], server.branches["me/open"] = False, {"main"}
    with pytest.raises(UserError, match="to be private, but it is there already and public"):
        hub.push(folder, "me/open", private=True)
    assert not server.files


def test_a_run_asks_the_hub_before_its_first_step(server, tmp_path, capsys):
    run = config_of(tmp_path, push_to_hub=True, hub_private_repo=True, hub_revision="v2")
    hub.open_repo(run, resumed=False)
    assert server.repos == {"me/my-run": True} and server.branches["me/my-run"] == {"main", "v2"}
    hub.open_repo(run, resumed=False)  # it is there now
    server.of_others.add("me/my-run")
    with pytest.raises(UserError, match=r"nothing can be pushed to my-run: .*403.*may not write"):
        hub.open_repo(run, resumed=False)
    server.of_others.clear()
    server.fails, server.fault = "validate-yaml", CARD_ERROR
    with pytest.raises(
        UserError, match=r"the card's front matter: \"license\" must be one of \[mit\]"
    ):
        hub.open_repo(run, resumed=False)
    server.status = 404  # a mirror that does not know the question
    hub.open_repo(run, resumed=False)
    server.fails, server.status = "/api/repos/create", 400
    with pytest.raises(UserError, match=r"nothing can be pushed .*leave the option out"):
        hub.open_repo(run, resumed=False)
    hub.open_repo(run, resumed=True)
    assert "The run goes on" in capsys.readouterr().err
    server.tokens.clear()
    hub.open_repo(config_of(tmp_path), resumed=False)
    assert not server.tokens  # without push_to_hub nobody is asked


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


def config_of(folder, **train):
    tree = run_tree(folder, output_dir=str(folder / "my-run"))
    tree["train"] |= train
    return build_config(tree, "run")


def test_the_end_of_a_run_pushes_as_its_options_say(server, model, tmp_path, capsys):
    folder, contents = model
    run = config_of(tmp_path, push_to_hub=True, hub_private_repo=True, hub_revision="v3")
    hub.check_hub(run)
    push_the_end(run, folder)
    assert server.repos == {"me/my-run": True}
    assert server.files == {("me/my-run", "v3"): contents}
    assert capsys.readouterr().out.startswith(f"pushed: {server.address}/me/my-run")
    server.fails = "/commit/"
    push_the_end(run, folder)  # the run is over, and no error of it
    told = " ".join(capsys.readouterr().err.split())
    assert (
        "the run is complete, its model is not pushed" in told and "(later with `dpo-fast" in told
    )
    assert f"dpo-fast push {folder} my-run --private --revision v3" in told
    server.tokens.clear()
    push_the_end(config_of(tmp_path), folder)
    assert not server.tokens  # without push_to_hub nobody is asked


def test_what_could_not_be_pushed_is_told_before_the_first_step(tmp_path, monkeypatch):
    import huggingface_hub

    constants = importlib.import_module("huggingface_hub.constants")
    monkeypatch.setattr(constants, "is_offline_mode", lambda: False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    run = config_of(tmp_path, push_to_hub=True)
    with pytest.raises(UserError, match="push_to_hub=true needs a token .* HF_TOKEN"):
        hub.check_hub(run)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: TOKEN)
    hub.check_hub(run)
    with pytest.raises(UserError, match="train.hub_model_id=a/b/c"):
        hub.check_hub(config_of(tmp_path, push_to_hub=True, hub_model_id="a/b/c"))
    monkeypatch.setattr(constants, "is_offline_mode", lambda: True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE=1"):
        hub.check_hub(run)
    for option in ({"hub_model_id": "a/b"}, {"hub_private_repo": False}, {"hub_revision": "x"}):
        with pytest.raises(UserError, match=r"hub_\w+=.* is not used: set train.push_to_hub"):
            config_of(tmp_path, **option)
