"""Ranks that end when what started them has been killed: `--nproc`, torchrun, deepspeed.

A launcher that is asked to end ends its ranks. One that is killed cannot, and a run that is started
again would meet the old one in its folder.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

LAUNCHER = "DPO_FAST_LAUNCHER"  # the process of --nproc, for its ranks
# In the command lines of other launchers.
NAMES = ("torchrun", "torch.distributed.run", "torch.distributed.launch", "deepspeed", "accelerate")
PROC = Path("/proc")
POLL = 0.5  # seconds, where the system cannot wait for a process that is not a child


@cache
def watch_launchers() -> None:
    """Send this process SIGTERM when a launcher above it has ended. Once for a process."""
    pids = list(launchers())
    if pids:
        threading.Thread(target=_wait, args=[pids], name="dpo_fast launcher", daemon=True).start()


def launchers() -> Iterator[int]:
    """Processes above this one that launch ranks, the nearest first."""
    if launcher := os.environ.get(LAUNCHER):
        yield int(launcher)
        return
    if "RANK" not in os.environ:
        return  # a shell that started a run may end
    pid = os.getppid()
    while pid > 1:
        if _is_launcher(pid):
            yield pid
        pid = _parent(pid)


def _is_launcher(pid: int) -> bool:
    try:
        words = (PROC / str(pid) / "cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:  # it has gone, or the system has no /proc
        return False
    # The name of the program or module: a file of the user's may be called deepspeed, too.
    names = [word.rpartition("/")[2] for word in words[:4]]
    return not names[0].endswith("sh") and any(name.startswith(NAMES) for name in names)


def _parent(pid: int) -> int:
    try:  # the name of the program, in brackets, may hold spaces
        return int((PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _wait(pids: list[int]) -> None:
    ended = _wait_by_descriptors(pids) if hasattr(os, "pidfd_open") else _wait_by_polling(pids)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"dpo-fast: the launcher, process {ended}, has ended", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)


def _wait_by_descriptors(pids: list[int]) -> int:
    waiting = select.poll()
    names = {}
    for pid in pids:
        try:
            names[os.pidfd_open(pid)] = pid
        except ProcessLookupError:
            return pid
        except OSError:  # the kernel is old, or a sandbox has no such call
            return _wait_by_polling(pids)
    for descriptor in names:
        waiting.register(descriptor, select.POLLIN)
    return names[waiting.poll()[0][0]]


def _wait_by_polling(pids: list[int]) -> int:
    while True:
        for pid in pids:
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                return pid
            except OSError:
                pass  # another user's, and there
        time.sleep(POLL)
