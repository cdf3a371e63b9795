"""Checkpoints pushed while a run goes on: what is pushed when, and what a push that fails leaves."""

import threading
from pathlib import Path

import pytest

pytest.importorskip("deepspeed")

from dpo_fast.api.process import as_found
from dpo_fast.errors import UserError
from dpo_fast.training.checkpoints import check_whole, checkpoints, read_state
from dpo_fast.training.config import build_config
from dpo_fast.training.earlier_run import MODEL
from dpo_fast.training.hub_saves import LAST, Pushes, push_save, pushing
from dpo_fast.training.loop import train
from dpo_fast.training.saver import Saver
from tests.support.engines import Engine
from tests.support.fake_hub import fake_hub
from tests.support.metrics import series
from tests.support.models import changed, run_tree, write_model, write_pairs

STEPS = 6


def config_of(folder: Path, **options):
    tree = run_tree(folder, max_steps=STEPS, save_steps=2, save_total_limit=1)
    hub = {"push_to_hub": True, "hub_model_id": "me/mine"}
    return build_config(changed(tree, folder / "run", train=tree["train"] | hub | options), "test")


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """A run that pushes its newest checkpoint: its folder, its configuration, and the hub after it."""
    folder = tmp_path_factory.mktemp("pushed")
    write_model(folder / "model")
    write_pairs(folder / "pairs.jsonl")
    config = config_of(folder, hub_strategy="checkpoint")
    with pytest.MonkeyPatch.context() as patch, fake_hub(patch) as server:
        with as_found():
            train(config)
        yield folder, config, server


def files_of(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def without(files: dict[str, bytes], folder: str) -> dict[str, bytes]:
    return {name: content for name, content in files.items() if not name.startswith(f"{folder}/")}


def test_the_newest_checkpoint_and_its_model_are_on_the_hub(pushed):
    folder, config, server = pushed
    (newest,) = checkpoints(folder / "run")
    files = server.files["me/mine", "main"]
    inside = {name.removeprefix(f"{LAST}/"): c for name, c in files.items() if LAST in name}
    assert inside == files_of(newest)
    model = without(files, LAST)
    assert set(model) == set(files_of(folder / "run" / MODEL)), "nothing of the engine at its root"
    assert model["model.safetensors"] == (folder / "run/final/model.safetensors").read_bytes()
    told = [message for message in server.messages if message.startswith("Training in progress")]
    assert f"Training in progress, step {STEPS}" in told
    assert f"Training in progress, step {STEPS}, checkpoint" in told


def test_a_run_goes_on_from_what_the_hub_has(pushed, tmp_path):
    folder, config, server = pushed
    for name, content in server.files["me/mine", "main"].items():
        if name.startswith(f"{LAST}/"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(content)
    check_whole(tmp_path / LAST)
    assert read_state(tmp_path / LAST)["step"] == STEPS
    again = {"resume_from_checkpoint": str(tmp_path / LAST), "push_to_hub": False}
    again |= {"hub_model_id": None, "hub_strategy": "end", "output_dir": str(tmp_path / "run")}
    tree = config.resolved()
    with as_found():
        model = train(build_config(tree | {"train": tree["train"] | again}, "test"))
    weights = folder / "run" / MODEL / "model.safetensors"
    assert (model / "model.safetensors").read_bytes() == weights.read_bytes()
    assert series(folder / "run", "loss")


def test_the_other_strategies(pushed, monkeypatch):
    folder, config, _ = pushed
    (newest,) = checkpoints(folder / "run")
    for strategy in ("every_save", "all_checkpoints"):
        train = config.train.model_copy(update={"hub_strategy": strategy})
        with fake_hub(monkeypatch) as server:
            push_save(config.model_copy(update={"train": train}), newest)
            files = server.files["me/mine", "main"]
        assert "model.safetensors" in files
        inside = {name.partition("/")[0] for name in files if "/" in name}
        assert inside == ({newest.name} if strategy == "all_checkpoints" else set())


def test_files_of_an_older_checkpoint_are_gone(pushed):
    folder, config, server = pushed
    (newest,) = checkpoints(folder / "run")
    server.files["me/mine", "main"][f"{LAST}/rank-7.pt"] = b"of more ranks"
    push_save(config, newest)
    assert f"{LAST}/rank-7.pt" not in server.files["me/mine", "main"]


@pytest.mark.parametrize("fails", ["preupload", "/commit/"])
def test_a_push_that_fails_is_told_with_its_command_and_nothing_is_lost(
    pushed, monkeypatch, capsys, fails
):
    folder, config, _ = pushed
    (newest,) = checkpoints(folder / "run")
    before = files_of(newest)
    with fake_hub(monkeypatch) as server:
        server.fails = fails
        saver = Saver(str(folder / "run"), keep=1)
        with pushing(config, saver):
            saver.published(newest)
    told = " ".join(capsys.readouterr().err.split())
    assert f"try again with `dpo-fast push {newest} me/mine`. The run goes on" in told
    assert files_of(newest) == before


def test_a_checkpoint_that_cannot_be_pushed_says_the_hubs_own_command(pushed, monkeypatch):
    folder, config, _ = pushed
    (newest,) = checkpoints(folder / "run")
    train = config.train.model_copy(update={"hub_revision": "v2"})
    monkeypatch.setattr("dpo_fast.training.hub_saves.push", lambda *_: None)
    with fake_hub(monkeypatch) as server:
        server.fails = "preupload"
        with pytest.raises(UserError) as told:
            push_save(config.model_copy(update={"train": train}), newest)
    command = f"hf upload me/mine {newest} {LAST} --revision v2"
    assert f"try again with `{command}`" in str(told.value)


def test_what_waits_gives_way_to_what_is_newer_and_stays_on_the_disk(tmp_path):
    for everything, wanted in ((False, [2, 6]), (True, [2, 4, 6])):
        began, may, seen = threading.Event(), threading.Event(), []

        def push_one(folder: Path, began=began, may=may, seen=seen) -> None:
            began.set()
            assert may.wait(60)
            assert folder.is_dir(), "removed before it was pushed"
            seen.append(int(folder.name.removeprefix("checkpoint-")))

        saver, pushes = Saver(str(tmp_path / str(everything)), keep=1), Pushes(push_one, everything)
        saver.published, saver.held = pushes.add, pushes.held
        for step in (2, 4, 6):
            saver.save(Engine(), {"step": step}, {})
            assert began.wait(60)
        kept = {path.name for path in checkpoints(saver.root)}
        assert {"checkpoint-2", "checkpoint-6"} <= kept and len(kept) == len(wanted)
        assert pushes.finish(0.01) == {f"checkpoint-{step}" for step in wanted}
        may.set()
        assert pushes.finish(60) == set() and seen == wanted
        saver.remove_old()
        assert [path.name for path in checkpoints(saver.root)] == ["checkpoint-6"]


@pytest.mark.parametrize("error", [UserError("the hub is full"), KeyError("the hub is full")])
def test_a_push_that_fails_does_not_keep_the_next_from_going(capsys, error):
    done = []

    def push_one(folder: Path) -> None:
        if folder.name == "checkpoint-2":
            raise error
        done.append(folder.name)

    pushes = Pushes(push_one, True)
    for step in (2, 4):
        pushes.add(Path(f"checkpoint-{step}"))
    assert pushes.finish(60) == set() and done == ["checkpoint-4"]
    said = " ".join(capsys.readouterr().err.split())
    assert "the hub is full" in said and "The run goes on" in said
    assert ("`dpo-fast push checkpoint-2`" in said) == isinstance(error, KeyError)


def test_options_of_a_push(tmp_path):
    assert config_of(tmp_path, hub_strategy="every_save").train.save_model
    assert not config_of(tmp_path).train.save_model, "nothing is pushed before the end"
    with pytest.raises(UserError, match="hub_strategy=checkpoint uploads the model of every"):
        config_of(tmp_path, hub_strategy="checkpoint", save_model=False)
    with pytest.raises(UserError, match="hub_strategy=every_save is not used: set train.push_to"):
        config_of(tmp_path, hub_strategy="every_save", push_to_hub=False, hub_model_id=None)
