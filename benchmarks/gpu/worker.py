"""A process that works on items of a step.

Lines come in, with the name of an item and the time by which it has to end; without a name the answer is
the list of names. Lines of JSON go out.
"""

from __future__ import annotations

import gc
import sys
import traceback

from benchmarks import interpreter, workers
from benchmarks.gpu import clock
from benchmarks.gpu.shapes import device
from benchmarks.gpu.steps import STEPS
from benchmarks.machine import release_memory


def failure(error: Exception) -> dict:
    """What an exception leaves behind. After an error of the device its process is of no more use."""
    text = str(error).strip()
    reason = f"{type(error).__name__}: {text[:600]}"
    return {"failed": reason} | ({"restart": True} if workers.is_fatal(error) else {})


def main(arguments: list[str]) -> int:
    step, rehearse = STEPS[arguments[0]], "--rehearse" in arguments
    answers = workers.answers()
    items = step.load().items(rehearse)
    if rehearse:
        interpreter.hasten()
    gc.freeze()  # what is imported need not be searched between items
    for line in sys.stdin:
        name, _, end = line.rstrip("\n").rpartition("\t")
        if not name:
            workers.tell(answers, {"items": list(items)})
            continue
        clock.begin(float(end))
        print(f"--- {name}", file=sys.stderr, flush=True)
        try:
            result = items[name]()
        except Exception as error:
            traceback.print_exc()
            result = failure(error)
        release_memory(device())
        workers.tell(answers, result)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
