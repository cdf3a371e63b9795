"""Joining a process group, and what ranks do in turn."""

import subprocess
import sys

import pytest

from tests.support import ranks
from tests.support.paths import ROOT

pytest.importorskip("deepspeed")

pytestmark = pytest.mark.processes

JOIN = "from dpo_fast.training.distributed import init_distributed; init_distributed(); print('in')"


def test_nothing_is_compiled_and_no_stale_lock_is_waited_for(tmp_path, monkeypatch):
    """A killed build of any DeepSpeed extension must not hang those that come after it."""
    build = tmp_path / "deepspeed_shm_comm"
    build.mkdir()
    (build / "lock").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", JOIN], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.splitlines()[-1:] == ["in"], done.stderr
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["lock"]


def test_work_of_the_first_rank_is_waited_for_in_every_run_of_a_process_group(tmp_path):
    ranks.group(2).do("in_turn", str(tmp_path))
