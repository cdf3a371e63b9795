"""Items of a step in processes of their own, so that a crash or a hang costs one item.

A process takes item after item, since loading torch takes longer than most items. One that dies, or takes
longer than an item may, is killed with its children, and another one goes on behind that item.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.machine import ROOT

TAIL = 1500  # characters of a dead process's last words


class Lost(RuntimeError):
    """The process that worked on an item is gone; the text says how."""


@dataclass
class Worker:
    """A process of `benchmarks.gpu.worker`, started when an item comes.

    log: what it prints goes here.
    """

    step: str
    rehearse: bool
    log: Path
    process: subprocess.Popen | None = None

    def run(self, item: str, seconds: float) -> dict:
        """The item's result.

        Raises:
            Lost: the process died, or the item took longer than `seconds`.
        """
        process = self.process or self._start()
        began = self.log.stat().st_size
        # The monotonic clock is the system's: what its start takes counts.
        process.stdin.write(f"{item}\t{time.monotonic() + seconds}\n".encode())
        process.stdin.flush()
        line = self._line(seconds)
        if line is None:
            self.end()
            raise Lost(f"no result in {seconds:.0f} seconds; killed")
        if not line:
            code = process.wait()
            self.end()
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            raise Lost(f"its process ended with {how}: {self._words(began)}")
        result = json.loads(line)
        if result.pop("restart", False):  # a device that has failed answers nobody in this process
            self.end()
        return result

    def _start(self) -> subprocess.Popen:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "benchmarks.gpu.worker", self.step]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command + ["--rehearse"] * self.rehearse,
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
                env=environment(self.rehearse),
            )
        return self.process

    def _line(self, seconds: float) -> bytes | None:
        """A line of its output; empty if it has ended, None if the time has."""
        end, found = time.monotonic() + seconds, b""
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while not found.endswith(b"\n"):
                if not selector.select(max(0.0, end - time.monotonic())):
                    return None
                part = os.read(self.process.stdout.fileno(), 1 << 16)
                if not part:
                    return b""
                found += part
        return found

    def _words(self, began: int) -> str:
        with self.log.open("rb") as log:
            log.seek(began)
            return log.read().decode(errors="replace")[-TAIL:].strip()

    def end(self) -> None:
        if self.process is not None:
            kill(self.process)
            self.process.stdin.close()
            self.process.stdout.close()
            self.process = None


def environment(rehearse: bool) -> dict[str, str]:
    """The variables of a worker: a rehearsal runs kernels in Triton's interpreter."""
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if rehearse else {}
    return (
        os.environ
        | hidden
        | {
            "TRITON_INTERPRET": "1" if rehearse else "0",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            "PYTHONUNBUFFERED": "1",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
    )


def kill(process: subprocess.Popen) -> None:
    """End a process and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def work(
    step: str,
    items: list[str],
    report: Callable[[str, dict], None],
    *,
    folder: Path,
    processes: int,
    seconds: float,
    deadline: float,
    rehearse: bool,
) -> None:
    """Work on the items, the first ones first, and report each as it ends.

    seconds: for one item.
    deadline: on the monotonic clock. What is running then is killed, and the rest is reported as not
        reached.
    """
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    for item in items:
        waiting.put(item)

    def serve(number: int) -> None:
        worker = Worker(step, rehearse, folder / f"{step}.{number}.log")
        try:
            while True:
                try:
                    item = waiting.get_nowait()
                except queue.Empty:
                    return
                report(item, _result(worker, item, min(seconds, deadline - time.monotonic())))
        finally:
            worker.end()

    threads = [
        threading.Thread(target=serve, args=(number,))
        for number in range(max(1, min(processes, len(items))))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _result(worker: Worker, item: str, seconds: float) -> dict:
    if seconds <= 0:
        return {"not_reached": True}
    start = time.monotonic()
    try:
        result = worker.run(item, seconds)
    except Lost as lost:
        result = {"failed": str(lost)}
    except BrokenPipeError:  # it died between two items
        worker.end()
        result = {"failed": "its process had ended before it could begin"}
    return result | {"seconds": round(time.monotonic() - start, 2)}
