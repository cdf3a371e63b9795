"""A process that measures settings: a line with each comes in, and lines of what becomes known go out.

    python -m benchmarks.kernels.worker [MODULE ...]

MODULE: with contenders beside those of the table.
"""

from __future__ import annotations

import functools
import gc
import json
import sys
import time
import traceback

from benchmarks import workers
from benchmarks.cli import Selection
from benchmarks.kernels import operations
from benchmarks.kernels.lines import Tell
from benchmarks.kernels.measure import Lineup, Setting, run
from benchmarks.machine import environment
from benchmarks.results import note


def work(request: dict, tell: Tell) -> None:
    values = request["setting"]
    setting = Setting(**values | {"modes": tuple(values["modes"])})
    here = environment(setting.device)["device"]
    done = {tuple(name) for device, name in request["done"] if device == here}
    deadline = request["deadline"]
    lineup = Lineup(
        selection=Selection(tuple(request["only"]), tuple(request["skip"])),
        repeats=request["repeats"],
        with_memory=request["with_memory"],
        seconds=None if deadline is None else deadline - time.monotonic(),
        without=done | set(map(tuple, request["without"])),
        known=request["known"],
        careful=request["careful"],
        tell=tell,
    )
    run(setting, operations.OPERATIONS[setting.op], lineup)


def main(modules: list[str]) -> int:
    tell = functools.partial(workers.tell, workers.answers())
    for module in modules:
        operations.add(module)
    gc.freeze()  # what is imported need not be searched between measurements
    for text in sys.stdin:
        try:
            work(json.loads(text), tell)
        except Exception as error:  # not a contender's, or the device has failed
            traceback.print_exc()
            tell({"line": "failed", "how": note(error, 200)[0]})
        tell({"line": "end"})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
