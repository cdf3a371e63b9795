"""Checkpoints pushed while a run goes on: what is pushed when, and what a push that fails leaves."""

import contextlib
import threading
from pathlib import Path

import pytest

pytest.importorskip("deepspeed")

from dpo_fast.api.ending import Ending, finish
from dpo_fast.api.process import as_found
from dpo_fast.errors import Interrupted, UserError
from dpo_fast.training import distributed, hub, hub_saves
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
        assert not pushes.ended(0.01)
        assert pushes.held() == {f"checkpoint-{step}" for step in wanted}
        may.set()
        assert pushes.ended(60) and pushes.left() == [] and seen == wanted
        saver.remove_old()
        assert [path.name for path in checkpoints(saver.root)] == ["checkpoint-6"]


@pytest.mark.parametrize("error", [UserError("the hub is full"), KeyError("the hub is full")])
@pytest.mark.parametrize("everything", [True, False])
def test_what_failed_is_held_and_tried_again_with_the_next(capsys, error, everything):
    tried, full = [], True

    def push_one(folder: Path) -> None:
        tried.append(folder.name)
        if full:
            raise error

    pushes, first, second = Pushes(push_one, everything), Path("checkpoint-2"), Path("checkpoint-4")
    pushes.add(first)
    assert pushes.ended(60) and pushes.left() == [first]
    assert pushes.held() == ({"checkpoint-2"} if everything else set())
    full = False
    pushes.add(second)
    assert pushes.ended(60) and pushes.left() == [] and pushes.held() == set()
    assert tried == ["checkpoint-2", *(["checkpoint-2"] if everything else []), "checkpoint-4"]
    said = " ".join(capsys.readouterr().err.split())
    assert "the hub is full" in said and "The run goes on" in said
    assert ("checkpoint-2 was not pushed: KeyError" in said) == isinstance(error, KeyError)


@pytest.mark.parametrize("stopped", [False, True])
def test_what_is_not_on_the_hub_at_the_end_is_told_with_its_commands(
    pushed, monkeypatch, capsys, stopped
):
    """Also of a run that is stopped while its hub hangs: it waits no longer than a moment."""
    folder, config, _ = pushed
    (newest,) = checkpoints(folder / "run")
    saver = Saver(str(folder / "run"), keep=1)
    monkeypatch.setattr(hub_saves, "HURRY", 0.2)
    monkeypatch.setattr(hub, "PAUSES", ())
    monkeypatch.setattr(hub_saves, "FIRST_WORD", 0.1)
    with fake_hub(monkeypatch) as server:
        place = ("/api/repos/create", "silent") if stopped else ("preupload", 403)
        server.fails, server.status = place
        with contextlib.suppress(Interrupted), pushing(config, saver):
            saver.published(newest)
            if stopped:
                raise Interrupted("a signal")
    for thread in threading.enumerate():
        if thread.name == "push":  # a process that ends would not wait for it
            thread.join(60)
    said = " ".join(capsys.readouterr().err.split())
    commands = f"`dpo-fast push {newest} me/mine` and `hf upload me/mine {newest} {LAST}`"
    assert f"{newest.name} is not on the hub: push it with {commands}" in said
    assert ("403: the hub is full (the token may not write there" in said) == (not stopped)


def test_a_hub_that_falls_silent_ends_the_wait_of_a_run_that_is_over(pushed, monkeypatch, capsys):
    folder, config, _ = pushed
    (newest,) = checkpoints(folder / "run")
    saver = Saver(str(folder / "run"), keep=1)
    monkeypatch.setattr(hub_saves, "FIRST_WORD", 0.1)
    monkeypatch.setattr(hub, "SILENCE", 0.5)
    with fake_hub(monkeypatch) as server:
        server.fails, server.status = "/commit/", "silent"
        with pushing(config, saver):
            saver.published(newest)
    said = " ".join(capsys.readouterr().err.split())
    assert f"waiting for uploads to me/mine: {newest.name}. Ctrl-C ends the wait" in said
    assert "me/mine, for 0 s now: " in said
    assert "the hub has not answered for 0.5 seconds" in said
    assert f"{newest.name} is not on the hub: push it with" in said


def test_other_ranks_push_nothing_and_wait_in_no_collective(pushed, monkeypatch):
    """An upload may take longer than parallel.timeout_minutes."""
    folder, config, _ = pushed
    waits, saver = [], Saver(str(folder / "run"), keep=1)
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    monkeypatch.setattr(distributed, "await_all", waits.append)
    with fake_hub(monkeypatch) as server:
        with pushing(config, saver):
            saver.published(checkpoints(folder / "run")[-1])
        assert finish(config, folder / "run" / MODEL, print, print) == Ending()
        assert not server.tokens and waits == ["pushes", "the end"]


def test_options_of_a_push(tmp_path):
    assert config_of(tmp_path, hub_strategy="every_save").train.save_model
    assert not config_of(tmp_path).train.save_model, "nothing is pushed before the end"
    with pytest.raises(UserError, match="hub_strategy=checkpoint uploads the model of every"):
        config_of(tmp_path, hub_strategy="checkpoint", save_model=False)
    with pytest.raises(UserError, match="hub_strategy=every_save is not used: set train.push_to"):
        config_of(tmp_path, hub_strategy="every_save", push_to_hub=False, hub_model_id=None)
