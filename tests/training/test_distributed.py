"""Joining a process group, and what ranks do in turn."""

import socket
import subprocess
import sys

import pytest

from tests.support import ranks
from tests.support.paths import ENVIRONMENT, ROOT

pytest.importorskip("deepspeed")

pytestmark = pytest.mark.processes

JOIN = """
import torch, torch.distributed as dist
from dpo_fast.training.distributed import init_distributed
init_distributed(0.5)
for group in (None, dist.new_group([0])):  # DeepSpeed's groups name no time-out
    backend = (group or dist.group.WORLD)._get_backend(torch.device("cpu"))
    print(backend.options._timeout.total_seconds())
print("in")
"""


def test_nothing_is_compiled_and_no_stale_lock_is_waited_for(tmp_path, monkeypatch):
    """A killed build of any DeepSpeed extension must not hang those that come after it."""
    build = tmp_path / "deepspeed_shm_comm"
    build.mkdir()
    (build / "lock").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", JOIN], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.splitlines()[-3:] == ["30.0", "30.0", "in"], done.stderr
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["lock"]


def test_work_of_the_first_rank_is_waited_for_in_every_run_of_a_process_group(tmp_path):
    ranks.group(2).do("in_turn", str(tmp_path))


def test_a_rank_that_stays_alone_says_so():
    lonely = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        lonely["MASTER_PORT"] = str(probe.getsockname()[1])
    code = "from dpo_fast.training.distributed import init_distributed; init_distributed(0.02)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=ENVIRONMENT | lonely,
        capture_output=True,
        text=True,
        timeout=120,
    )
    message = "rank 0 of 2 has not found the others at 127.0.0.1:"
    assert message in done.stderr and "1/2 clients joined" in done.stderr, done.stderr


def test_srun_without_an_address_is_told(monkeypatch):
    from dpo_fast.errors import UserError
    from dpo_fast.training.distributed import init_distributed

    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")  # adopted from srun, and forgotten afterwards
        monkeypatch.delenv(name)
    for name, value in (("STEP_NUM_TASKS", "2"), ("PROCID", "1"), ("LOCALID", "1")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    with pytest.raises(UserError, match="rank 1 of 2 .* export MASTER_ADDR and MASTER_PORT"):
        init_distributed()


def test_a_port_that_another_run_has_is_told(monkeypatch):
    """Two jobs of a scheduler on one machine."""
    import torch.distributed as dist

    from dpo_fast.errors import UserError
    from dpo_fast.training.distributed import joining

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(port))
        with pytest.raises(UserError, match=f":{port}: another .*MASTER_PORT"), joining(1):
            dist.TCPStore("127.0.0.1", port, 1, True)


@pytest.mark.parametrize("value", ["1e300", "0", "-1", "nan", "inf"])
def test_a_time_out_that_is_none_is_told(value):
    from dpo_fast.errors import UserError
    from dpo_fast.training.config import build_config

    tree = {"model": {"path": "m"}, "data": {"train": "d"}, "parallel": {"timeout_minutes": value}}
    with pytest.raises(UserError, match="parallel.timeout_minutes"):
        build_config(tree, "tree")
