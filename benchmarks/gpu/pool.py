"""Items of a step in processes of their own, so that a crash or a hang costs one item.

A process takes item after item, since loading torch takes longer than most items. One that dies, or takes
longer than an item may, is killed with its children, and another one goes on behind that item.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks import workers

START_SECONDS = 60  # for a process to import torch and see the device


@dataclass
class ItemWorker:
    """A process of `benchmarks.gpu.worker`, which works on items of one step."""

    worker: workers.Worker

    @classmethod
    def of(cls, step: str, rehearse: bool, log: Path) -> ItemWorker:
        module = ("benchmarks.gpu.worker", step, *["--rehearse"] * rehearse)
        return cls(workers.Worker(module, log, variables(rehearse)))

    def names(self, seconds: float) -> list[str]:
        """The items of the step, which its process knows: they may depend on the device."""
        self.worker.send(f"\t{time.monotonic() + seconds}")
        return self.worker.answer(seconds)["items"]

    def run(self, item: str, seconds: float) -> dict:
        """The item's result.

        Raises:
            Lost: the process died, or the item took longer than `seconds`.
        """
        if self.worker.process is None:  # its start is not the item's time
            self.names(START_SECONDS)
        self.worker.send(f"{item}\t{time.monotonic() + seconds}")  # the system's clock
        result = self.worker.answer(seconds)
        if result.pop("restart", False):  # a device that has failed answers nobody in this process
            self.worker.end()
        return result


def variables(rehearse: bool) -> dict[str, str]:
    """The variables of a worker: a rehearsal runs kernels in Triton's interpreter."""
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if rehearse else {}
    return hidden | {
        "TRITON_INTERPRET": "1" if rehearse else "0",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def environment(rehearse: bool) -> dict[str, str]:
    return workers.importing() | variables(rehearse)


def work(
    step: str,
    choose: Callable[[list[str]], list[str]],
    report: Callable[[str, dict], None],
    *,
    folder: Path,
    processes: int,
    seconds: float,
    deadline: float,
    rehearse: bool,
) -> None:
    """Work on the items, the first ones first, and report each as it ends.

    choose: which of the step's items.
    seconds: for one item.
    deadline: on the monotonic clock. What is running then is killed, and the rest is reported as not
        reached.

    Raises:
        Lost: the step's process did not even tell its items.
    """
    crew = [
        ItemWorker.of(step, rehearse, folder / f"{step}.{number}.log")
        for number in range(processes)
    ]
    try:
        items = choose(crew[0].names(min(START_SECONDS, deadline - time.monotonic())))
    except workers.Lost:
        crew[0].worker.end()
        raise
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    for item in items:
        waiting.put(item)

    def serve(own: ItemWorker) -> None:
        try:
            while True:
                try:
                    item = waiting.get_nowait()
                except queue.Empty:
                    return
                report(item, _result(own, item, min(seconds, deadline - time.monotonic())))
        finally:
            own.worker.end()

    threads = [threading.Thread(target=serve, args=(own,)) for own in crew[: max(1, len(items))]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _result(own: ItemWorker, item: str, seconds: float) -> dict:
    if seconds <= 0:
        return {"not_reached": True}
    start = time.monotonic()
    try:
        result = own.run(item, seconds)
    except workers.Lost as lost:
        result = {"failed": f"{lost}: {lost.words}" if lost.words and not lost.late else str(lost)}
    return result | {"seconds": round(time.monotonic() - start, 2)}
