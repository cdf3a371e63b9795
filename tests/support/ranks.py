"""Ranks that stay: processes with the trainer imported, which take one job after the other.

Starting a rank takes five seconds of a core, and a tiny run less than one. So every pytest process
keeps one group of processes per number of ranks, and all its tests share them. A group in which a
job failed is ended, and the next job starts another. What must happen in a process of its own (a
resumed run, a command) starts that itself.
"""

import json
import os
import selectors
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from tests.support.paths import ENVIRONMENT, ROOT

WORKER = ROOT / "tests/support/workers/jobs.py"


def train(trees: list[dict], ranks: int = 1) -> None:
    """Whole runs, one after the other, as `dpo-fast train` would do them."""
    group(ranks).do("train", trees)


def refusal(tree: dict, ranks: int = 1) -> str:
    """What a run is refused with."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "message"
        group(ranks).do("refused", tree, str(file))
        return file.read_text()


def first_steps(trees: dict[str, dict], ranks: int = 1) -> dict[str, tuple[float, dict]]:
    """By name: the loss of step 0, and the gradient of every parameter before clipping."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "steps.pt"
        group(ranks).do("first_steps", trees, str(file))
        return torch.load(file, weights_only=True)


def evaluate(cases: dict[str, dict], ranks: int = 1) -> dict[str, dict]:
    """By name what `dpo-fast evaluate` finds. cases: the arguments of `evaluation_of`."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "metrics.json"
        group(ranks).do("evaluate", cases, str(file))
        return json.loads(file.read_text())


class Ranks:
    """`count` ranks that wait for jobs. They end with this process, or with `end`."""

    def __init__(self, count: int) -> None:
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.processes, self.replies = [], []
        for variables in _environments(count):
            read, write = os.pipe()
            process = subprocess.Popen(
                [sys.executable, str(WORKER), str(write)],
                env=variables,
                stdin=subprocess.PIPE,
                stdout=self.log,
                stderr=self.log,
                pass_fds=[write],
                text=True,
            )
            os.close(write)
            self.processes.append(process)
            self.replies.append(os.fdopen(read))

    @property
    def alive(self) -> bool:
        return bool(self.processes) and all(p.poll() is None for p in self.processes)

    def do(self, job: str, *arguments, timeout: float = 580) -> None:
        """Have a job done by all ranks.

        Raises:
            AssertionError: a rank failed, ended or took too long; with its traceback and the log's end.
        """
        assert self.alive, "a job failed before, and the ranks are gone"
        start = self.log.seek(0, os.SEEK_END)
        for process in self.processes:
            process.stdin.write(json.dumps([job, *arguments]) + "\n")
            process.stdin.flush()
        if error := self._wait(time.monotonic() + timeout):
            self.end()
            self.log.seek(start)
            raise AssertionError(f"{job}: {error}\n{self.log.read()[-6000:]}")

    def _wait(self, deadline: float) -> str | None:
        """The first error, or None when every rank has said that it is done."""
        with selectors.DefaultSelector() as waiting:
            for reply in self.replies:
                waiting.register(reply, selectors.EVENT_READ)
            while waiting.get_map():
                ready = waiting.select(deadline - time.monotonic())
                if not ready:
                    return "took too long"
                for key, _ in ready:
                    line = key.fileobj.readline()
                    error = json.loads(line) if line else "a rank ended"
                    if error:
                        return error
                    waiting.unregister(key.fileobj)
        return None

    def said(self) -> str:
        """All that the ranks have written so far, to standard output and error."""
        self.log.seek(0)
        return self.log.read()

    def end(self) -> None:
        for process, reply in zip(self.processes, self.replies):
            process.kill()
            process.wait()
            process.stdin.close()
            reply.close()
        self.processes, self.replies = [], []


GROUPS: dict[int, Ranks] = {}


def group(count: int) -> Ranks:
    """This process's group of so many ranks."""
    if count not in GROUPS or not GROUPS[count].alive:
        GROUPS[count] = Ranks(count)
    return GROUPS[count]


def _environments(count: int) -> list[dict[str, str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    ranks = ({"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count))
    return [ENVIRONMENT | common | rank for rank in ranks]
