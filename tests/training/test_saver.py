"""Saving beside the run: what is saved is what was there, complete or absent, and failures are told."""

import contextlib
import json
import resource
import threading
from datetime import timedelta
from pathlib import Path

import pytest
import torch

pytest.importorskip("deepspeed")

from dpo_fast.errors import UserError
from dpo_fast.training import tensor_files
from dpo_fast.training.best import Best
from dpo_fast.training.checkpoints import check_whole, find_checkpoint, load_checkpoint
from dpo_fast.training.config import build_config
from dpo_fast.training.saver import Saver
from tests.support import ranks
from tests.support.engines import Engine
from tests.support.metrics import series
from tests.support.models import changed, run_tree, write_model, write_pairs


def beside(root: Path) -> Saver:
    return Saver(str(root), keep=2, beside=True, timeout=timedelta(minutes=1))


@contextlib.contextmanager
def files_of_at_most(size: int):
    """No process may write a larger file, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def held(monkeypatch):
    """An event until which the background writes nothing."""
    may, write = threading.Event(), tensor_files.write_tree

    def waiting(*arguments):
        assert may.wait(60)
        return write(*arguments)

    monkeypatch.setattr(tensor_files, "write_tree", waiting)
    return may


def test_a_checkpoint_holds_what_was_there_and_appears_when_it_is_whole(tmp_path, held):
    saver, engine, metrics = beside(tmp_path), Engine(), {"loss": torch.tensor(1.0)}
    schedule = {"rates": [0.5]}
    engine.more = {"schedule": schedule}
    saver.save(engine, {"step": 1}, metrics)
    engine.weights += 1  # the next step
    metrics["loss"] += 1
    schedule["rates"][0] = 0.25
    saver.check()
    assert find_checkpoint(True, str(tmp_path)) is None
    held.set()
    saver.wait()
    folder = find_checkpoint(True, str(tmp_path))
    check_whole(folder)
    loaded, sums = Engine(), {}
    assert load_checkpoint(loaded, folder, {}, sums)["run"] == saver.run
    assert torch.equal(loaded.weights, torch.arange(64.0)) and sums["loss"] == 1.0
    assert loaded.more == {"schedule": {"rates": [0.5]}}


def test_the_next_saving_waits_and_uses_the_memory_again(tmp_path, held):
    saver, engine = beside(tmp_path), Engine()
    saver.save(engine, {"step": 1}, {})
    kept = dict(saver._copies._kept)
    threading.Timer(0.3, held.set).start()
    engine.weights += 1
    saver.save(engine, {"step": 2}, {})
    assert (tmp_path / "checkpoint-1").is_dir(), "the second began before the first had ended"
    with saver:  # leaving it waits
        pass
    assert find_checkpoint(True, str(tmp_path)).name == "checkpoint-2"
    assert {key: id(value) for key, value in saver._copies._kept.items()} == {
        key: id(value) for key, value in kept.items()
    }
    for step in (1, 2):
        loaded = Engine()
        load_checkpoint(loaded, tmp_path / f"checkpoint-{step}", {}, {})
        assert torch.equal(loaded.weights, torch.arange(64.0) + step - 1)


def test_best_json_never_names_a_checkpoint_that_is_not_there(tmp_path, held):
    """Neither the one that is still written, nor an older one that has made room for it."""
    tree = {
        "metric_for_best_model": "loss",
        "eval_steps": 1,
        "save_total_limit": 1,
        "output_dir": str(tmp_path),
    }
    sections = {"model": {"path": "m"}, "data": {"train": "d", "eval_rows": 1}, "train": tree}
    best, saver = Best(build_config(sections, "tree")), Saver(str(tmp_path), keep=1, beside=True)
    seen = []

    def save(step: int, loss: float) -> None:
        best.note(step, {"eval_loss": loss})
        saver.wait()
        best.keep(step)
        saver.best = best.kept_name
        write = best.writing()

        def named() -> None:
            seen.append(sorted(path.name for path in tmp_path.glob("checkpoint-*")))
            write()

        saver.save(Engine(), {"step": step}, {}, named=named)

    def told() -> str:
        return json.loads((tmp_path / "best.json").read_text())["checkpoint"]

    save(1, 0.5)
    assert not (tmp_path / "best.json").exists(), "it is told before the checkpoint is there"
    held.set()
    saver.wait()
    assert told() == "checkpoint-1"
    save(2, 0.4)
    saver.wait()
    assert told() == "checkpoint-2" and seen == [["checkpoint-1"], ["checkpoint-1", "checkpoint-2"]]
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


@pytest.mark.parametrize("way", ["check", "wait", "leave"])
def test_a_disk_that_is_full_is_told_at_the_next_step_and_at_the_end(tmp_path, way):
    saver = beside(tmp_path)
    saver.save(Engine(), {"step": 1}, {})
    saver.wait()
    told = pytest.raises(
        UserError, match=r"model-0.pt cannot be written: .*File too large.* are whole"
    )
    with files_of_at_most(2000), told, saver if way == "leave" else contextlib.nullcontext():
        saver.save(Engine(weights=torch.zeros(1000)), {"step": 2}, {})
        if way == "check":
            saver._pending._thread.join()
            saver.check()
        elif way == "wait":
            saver.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "latest"]
    check_whole(tmp_path / "checkpoint-1")


def test_a_full_disk_is_told_at_once_without_it(tmp_path):
    saver = Saver(str(tmp_path), keep=2)
    with (
        files_of_at_most(2000),
        pytest.raises(UserError, match="cannot be written: .*File too large"),
    ):
        saver.save(Engine(weights=torch.zeros(1000)), {"step": 2}, {})
    assert not list(tmp_path.iterdir())


def test_what_a_killed_run_left_aside_is_removed(tmp_path):
    for name in (".checkpoint-7.partial", ".checkpoint-3.old"):
        (tmp_path / name).mkdir()
    Saver(str(tmp_path), keep=2).save(Engine(), {"step": 8}, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-8", "latest"]


def test_latest_never_names_another_run(tmp_path):
    """A run may go on in another folder, but not among the checkpoints of others."""
    for name in ("one", "other"):
        Saver(str(tmp_path / name), keep=2).save(Engine(), {"step": 5}, {})
    saver = Saver(str(tmp_path / "one"), keep=2)
    for step in (6, 7):
        saver.save(Engine(), {"step": step}, {})
    for folder in (tmp_path / "one" / "checkpoint-6", tmp_path / "one" / "checkpoint-7"):
        with pytest.raises(UserError, match="other holds checkpoint-5, which is not of the run of"):
            find_checkpoint(str(folder), str(tmp_path / "other"))
    chosen = find_checkpoint(str(tmp_path / "one/checkpoint-6"), str(tmp_path / "one"))
    again = Saver(str(tmp_path / "one"), keep=2)
    again.goes_on_from(chosen, load_checkpoint(Engine(), chosen, {}, {}))
    assert again.run == saver.run
    assert find_checkpoint(True, str(tmp_path / "one")).name == "checkpoint-6"


@pytest.mark.processes
@pytest.mark.slow
def test_a_run_that_saves_beside_it_is_the_same_on_two_ranks(tmp_path):
    write_model(tmp_path / "model")
    write_pairs(tmp_path / "pairs.jsonl", 20)
    base = run_tree(tmp_path, max_steps=4, micro_batch_size=2, save_steps=1, save_total_limit=9)
    base["parallel"] = {"zero_stage": 1}
    ways = {"at-once": {}, "beside": {"async_save": True}}
    trees = {
        name: changed(base, tmp_path / name, train=base["train"] | way)
        for name, way in ways.items()
    }
    resumed = changed(trees["beside"], tmp_path / "resumed")
    resumed["train"]["resume_from_checkpoint"] = str(tmp_path / "beside" / "checkpoint-2")
    ranks.train([*trees.values(), resumed], ranks=2)
    curve = series(tmp_path / "at-once")
    assert len(curve) == 4 and series(tmp_path / "beside") == curve
    assert series(tmp_path / "resumed") == {step: curve[step] for step in (3, 4)}
    for step in range(1, 5):
        check_whole(tmp_path / "beside" / f"checkpoint-{step}")
    final = [
        (tmp_path / name / "final/model.safetensors").read_bytes() for name in (*trees, "resumed")
    ]
    assert final[0] == final[1] == final[2]


@pytest.mark.processes
@pytest.mark.parametrize("way", [False, True])
def test_a_disk_that_is_full_on_one_rank_is_told_by_all(tmp_path, way):
    ranks.group(2).do("full_disk", str(tmp_path), way, timeout=60)
    assert not list(tmp_path.glob("*checkpoint*"))


def test_what_is_no_failure_to_write_is_not_told_as_one(tmp_path):
    class Odd:
        def __reduce__(self):
            raise ZeroDivisionError("no number")

    engine = Engine()
    engine.more = {"odd": Odd()}
    with pytest.raises(ZeroDivisionError, match="no number"):
        Saver(str(tmp_path), keep=2).save(engine, {"step": 1}, {})
    assert not list(tmp_path.iterdir())
