"""Processes that end with the one that started them."""

import subprocess
import sys

import pytest

pytest.importorskip("multiprocess")

from tests.support.paths import ENVIRONMENT

# Each child holds the pipe of standard output until it ends.
KILLED = """
import os, signal, time
import multiprocess
from dpo_fast.data.children import bound_to_this_process

with bound_to_this_process():
    multiprocess.Manager()
    multiprocess.Process(target=time.sleep, args=[600]).start()
print("started", flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.processes
@pytest.mark.skipif(
    sys.platform != "linux", reason="Linux tells a process that its parent has ended"
)
def test_no_worker_outlives_a_killed_parent():
    command = [sys.executable, "-c", KILLED]
    ended = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert ended.stdout == "started\n", ended.stderr
