"""--nproc: ranks on this machine, without another launcher. All end when one fails."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

from dpo_fast.training.distributed import cores

GRACE_SECONDS = 10.0  # after a failure the other ranks have so long to report it and end


def launch(nproc: int, arguments: list[str]) -> int:
    """Run `dpo-fast *arguments` as `nproc` ranks; see `launch_command`."""
    return launch_command(nproc, [sys.executable, "-m", "dpo_fast", *arguments], dict(os.environ))


def launch_command(nproc: int, command: list[str], environment: dict[str, str]) -> int:
    """Run a command as `nproc` ranks. Returns the exit code of the first that failed, or 0.

    Ctrl-C reaches the ranks through the terminal, and SIGTERM is passed on. The ranks finish their step,
    save and exit; this process waits for them.
    """
    ranks: list[subprocess.Popen] = []
    handlers = {
        signal.SIGINT: signal.SIG_IGN,
        signal.SIGTERM: lambda *_: [p.terminate() for p in ranks if p.poll() is None],
    }
    for variables in _rank_environments(nproc, environment):
        ranks.append(subprocess.Popen(command, env=variables))
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        return _wait(ranks)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _rank_environments(nproc: int, environment: dict[str, str]) -> list[dict[str, str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= {"WORLD_SIZE": str(nproc), "LOCAL_WORLD_SIZE": str(nproc)}
    # Set before a rank starts: thread pools are sized when their libraries load.
    threads = {"OMP_NUM_THREADS": str(max(cores() // nproc, 1))}
    ranks = ({"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(nproc))
    return [threads | environment | common | rank for rank in ranks]


def _wait(ranks: list[subprocess.Popen]) -> int:
    """Wait until all have ended. After a failure the others get some seconds to end by themselves."""
    failed, deadline = 0, float("inf")
    while any(p.poll() is None for p in ranks):
        failed = failed or next((p.returncode for p in ranks if p.returncode), 0)
        if failed and deadline == float("inf"):
            deadline = time.monotonic() + GRACE_SECONDS
        if time.monotonic() > deadline:
            for p in ranks:
                p.kill()
        time.sleep(0.05)
    code = failed or next((p.returncode for p in ranks if p.returncode), 0)
    # A rank that a signal killed has a negative code: the shell's convention is 128 + number.
    return code if code >= 0 else 128 - code
