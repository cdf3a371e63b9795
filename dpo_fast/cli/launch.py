"""--nproc: ranks on this machine, without a launcher in between. All end when one fails."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

from dpo_fast.training.distributed import cores

GRACE_SECONDS = 10.0  # after one rank has failed, for the others to say so themselves


def launch(nproc: int, arguments: list[str]) -> int:
    """Run `dpo-fast *arguments` as `nproc` ranks; returns the first failure's exit code, or 0.

    Ctrl-C reaches the ranks through the terminal; SIGTERM is passed on. They finish their step, save
    and exit, and this process waits for that.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Set before a rank starts: thread pools are sized when their libraries load.
    threads = os.environ.get("OMP_NUM_THREADS", str(max(cores() // nproc, 1)))
    common = {"OMP_NUM_THREADS": threads}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(nproc)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "dpo_fast", *arguments],
            env=os.environ
            | common
            | {"RANK": str(r), "LOCAL_RANK": str(r), "LOCAL_WORLD_SIZE": str(nproc)},
        )
        for r in range(nproc)
    ]
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: [p.terminate() for p in ranks if p.poll() is None])
    failed: int | None = None
    deadline = float("inf")
    while any(p.poll() is None for p in ranks):
        codes = [p.returncode for p in ranks if p.returncode]
        if codes and failed is None:
            failed, deadline = codes[0], time.monotonic() + GRACE_SECONDS
        if time.monotonic() > deadline:
            for p in ranks:
                p.kill()
        time.sleep(0.05)
    codes = [failed] if failed else [p.returncode for p in ranks if p.returncode]
    # A rank that a signal killed has a negative code: the shell's convention is 128 + number.
    return (codes[0] if codes[0] > 0 else 128 - codes[0]) if codes else 0
