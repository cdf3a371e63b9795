"""--nproc: ranks on this machine, without another launcher. All end when one fails."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

from dpo_fast.training.distributed import cores
from dpo_fast.training.launchers import LAUNCHER
from dpo_fast.training.signals import ALWAYS, IF_FREE

GRACE_SECONDS = 10.0  # after a failure the other ranks have so long to report it and end


def launch(nproc: int, arguments: list[str]) -> int:
    """Run `dpo-fast *arguments` as `nproc` ranks; see `launch_command`."""
    return launch_command(nproc, [sys.executable, "-m", "dpo_fast", *arguments], dict(os.environ))


def launch_command(nproc: int, command: list[str], environment: dict[str, str]) -> int:
    """Run a command as `nproc` ranks. Returns the exit code of the first that failed, or 0.

    Signals are passed on. The ranks finish their step, save and exit; this process waits for them. If it
    is killed, they notice (`training/launchers.py`).
    """
    ranks: list[subprocess.Popen] = []

    def pass_on(number: int, frame) -> None:
        for process in ranks:
            if process.poll() is None:
                process.send_signal(number)

    # Those that the ranks' own handlers are for. A terminal sends Ctrl-C to the ranks as well, and they
    # take the two for one.
    free = [number for number in IF_FREE if signal.getsignal(number) == signal.SIG_DFL]
    handlers = dict.fromkeys((*ALWAYS, *free), pass_on)
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        for variables in _rank_environments(nproc, environment):
            ranks.append(subprocess.Popen(command, env=variables))
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
    common[LAUNCHER] = str(os.getpid())
    # Set before a rank starts: thread pools are sized when their libraries load.
    threads = {"OMP_NUM_THREADS": str(max(cores() // nproc, 1))}
    ranks = ({"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(nproc))
    return [threads | environment | common | rank for rank in ranks]


def _wait(ranks: list[subprocess.Popen]) -> int:
    """Wait until all have ended. After a failure the others get some seconds to end by themselves."""
    deadline = None
    while None in [p.poll() for p in ranks]:  # all of them: a later one may have failed first
        failed = _failure(ranks)
        if failed and deadline is None:
            deadline = time.monotonic() + GRACE_SECONDS
        if deadline is not None and time.monotonic() > deadline:
            for p in ranks:
                p.kill()
                p.wait()
            return failed
        time.sleep(0.05)
    return _failure(ranks)


def _failure(ranks: list[subprocess.Popen]) -> int:
    """The code of a rank that has failed, or 0. One that a signal killed is the cause of the others'.

    Its code is negative: the shell's convention is 128 + number.
    """
    code = min((p.returncode for p in ranks if p.returncode), default=0)
    return code if code >= 0 else 128 - code
