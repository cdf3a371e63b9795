"""Checkpoints are whole or refused by name: damage, mixtures, planted pickles, full disks, other runs."""

import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("deepspeed")

from dpo_fast.errors import UserError
from dpo_fast.training.checkpoints import checkpoints, find_checkpoint, load_checkpoint
from dpo_fast.training.saver import Saver
from tests.support.engines import Engine


def saved(root: Path, *steps: int, keep: int = 2, saver: Saver | None = None) -> list[str]:
    """The checkpoints that are there after a run has saved at these steps."""
    saver = saver or Saver(str(root), keep)
    for step in steps:
        saver.save(Engine(weights=torch.full([64], float(step))), {"step": step}, {})
        saver.wait()
        assert find_checkpoint(True, str(root)).name == f"checkpoint-{step}"
    return [folder.name for folder in checkpoints(root)]


def test_a_shorter_run_in_the_same_folder_keeps_its_own_checkpoints(tmp_path):
    assert saved(tmp_path, 40, 80) == ["checkpoint-40", "checkpoint-80"]
    assert saved(tmp_path, 2) == ["checkpoint-2", "checkpoint-80"]
    assert saved(tmp_path, 4, 6) == ["checkpoint-4", "checkpoint-6"]


@pytest.mark.parametrize("keep, kept", [(1, (1, 4)), (2, (1, 4)), (3, (1, 3, 4))])
def test_the_best_checkpoint_is_one_of_those_that_stay(tmp_path, keep, kept):
    saver = Saver(str(tmp_path), keep=keep)
    saved(tmp_path, 1, saver=saver)
    saver.best = "checkpoint-1"
    names = saved(tmp_path, 2, 3, 4, saver=saver)
    assert names == [f"checkpoint-{step}" for step in kept]
    saver.best = "checkpoint-5"
    last = [f"checkpoint-{step}" for step in (3, 4, 5)][-keep:]
    assert saved(tmp_path, 5, saver=saver) == last


def test_without_a_limit_all_checkpoints_stay(tmp_path):
    names = saved(tmp_path, *range(1, 6), saver=Saver(str(tmp_path), keep=None))
    assert names == [f"checkpoint-{step}" for step in range(1, 6)]


@pytest.mark.parametrize("file", ["state.json", "trainer_state.json"])
def test_a_folder_of_the_users_own_is_no_checkpoint(tmp_path, file):
    """Nor is one of transformers' Trainer, which has the same name."""
    own = tmp_path / ("checkpoint-best" if file == "state.json" else "checkpoint-500")
    own.mkdir()
    (own / file).write_text("{}")
    assert saved(tmp_path, 1, 2, 3) == ["checkpoint-2", "checkpoint-3"]
    assert (own / file).exists()


def test_a_checkpoint_of_another_model_is_told(tmp_path):
    saved(tmp_path, 1)
    folder = tmp_path / "checkpoint-1"
    load_checkpoint(Engine(), folder, {"step": 1}, {})
    with pytest.raises(UserError, match="engine cannot be read: size mismatch"):
        load_checkpoint(Engine(RuntimeError("size mismatch")), folder, {"step": 1}, {})


def test_a_checkpoint_of_another_version_is_told_as_one(tmp_path):
    saved(tmp_path, 1)
    folder, fits = tmp_path / "checkpoint-1", {"step": 1, "layout": "packed"}
    with pytest.raises(UserError, match="another version of dpo_fast .* lacks layout"):
        load_checkpoint(Engine(), folder, fits, {})
    with pytest.raises(UserError, match="exactly: step was 1 and is 2. Set it back"):
        load_checkpoint(Engine(), folder, fits | {"step": 2}, {})


def test_what_latest_cannot_tell_the_folders_do(tmp_path):
    saved(tmp_path, 1)
    (tmp_path / "latest").write_bytes(b"\xff\xfe")
    assert find_checkpoint(True, str(tmp_path)).name == "checkpoint-1"
    saved(tmp_path / "other", 2)
    (tmp_path / "latest").write_text("other/checkpoint-2")
    assert find_checkpoint(True, str(tmp_path)).name == "checkpoint-1", "of another folder"
    (tmp_path / "checkpoint-1").rename(tmp_path / "best")
    (tmp_path / "latest").write_text("best")
    assert find_checkpoint(True, str(tmp_path)).name == "best"
    (tmp_path / "latest").write_text("x" * 5000)
    assert find_checkpoint(True, str(tmp_path)) is None
    (tmp_path / "latest").unlink()
    os.mkfifo(tmp_path / "latest")
    assert find_checkpoint(True, str(tmp_path)) is None
