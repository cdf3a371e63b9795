"""What a checkpoint costs a run: at once and beside it, interleaved in one process.

    python -m benchmarks.saving --gib 1 --rounds 5

A run is stood for by steps of matrix products on the same device, and its state by tensors of this size. A
block of steps is timed without a checkpoint, with one at once and with one beside it (`train.async_save`).
`stall` is the time inside `save`, and `lost` what the block took longer than the one without.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from dpo_fast.training import distributed
from dpo_fast.training.saver import Saver

PIECE = 1 << 24  # elements of one tensor


class State:
    """An engine that has tensors of so many bytes, and saves them as DeepSpeed does."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.device = device
        count = max(size // (4 * PIECE), 1)
        self.tensors = {str(i): torch.randn(PIECE, device=device) for i in range(count)}
        self.weight = torch.randn(1024, 1024, device=device)

    def save_checkpoint(self, folder: str, tag: str, save_latest: bool) -> None:
        self.checkpoint_engine.makedirs(f"{folder}/{tag}", exist_ok=True)
        self.checkpoint_engine.save(self.tensors, f"{folder}/{tag}/state.pt")

    def step(self) -> None:
        for _ in range(8):
            self.weight = torch.nn.functional.normalize(self.weight @ self.weight)
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def block(state: State, steps: int, saver: Saver | None, number: int) -> tuple[float, float]:
    """Seconds of a block of steps, and those inside `save`. The last checkpoint is waited for."""
    begin, stall = time.perf_counter(), 0.0
    for step in range(steps):
        if saver is not None and step == 0:
            before = time.perf_counter()
            saver.save(state, {"step": number}, {})
            stall = time.perf_counter() - before
        state.step()
        if saver is not None:
            saver.check()
    if saver is not None:
        saver.wait()
    return time.perf_counter() - begin, stall


def measure(gib: float, rounds: int, seconds: float) -> dict[str, dict[str, float]]:
    state = State(int(gib * 2**30), distributed.device())
    begin = time.perf_counter()
    for _ in range(10):
        state.step()
    steps = max(int(seconds / (time.perf_counter() - begin) * 10), 1)
    with tempfile.TemporaryDirectory(dir=".") as folder:
        savers = {
            "none": None,
            "at once": Saver(str(Path(folder) / "at-once"), 1),
            "beside": Saver(str(Path(folder) / "beside"), 1, beside=True),
        }
        times: dict[str, list] = {name: [] for name in savers}
        for number in range(rounds + 1):  # the first takes memory, and is left out
            for name, saver in savers.items():
                times[name].append(block(state, steps, saver, number + 1))
    whole = {name: [each[0] for each in found[1:]] for name, found in times.items()}
    lost = {
        name: statistics.median(a - b for a, b in zip(found, whole["none"]))
        for name, found in whole.items()
    }
    return {
        name: {
            "stall_s": round(statistics.median(each[1] for each in times[name][1:]), 3),
            "lost_s": round(lost[name], 3),
            "first_stall_s": round(times[name][0][1], 3),
        }
        for name in ("at once", "beside")
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=8.0, help="of a block")
    asked = parser.parse_args()
    found = measure(asked.gib, asked.rounds, asked.seconds)
    ratio = found["beside"]["stall_s"] / found["at once"]["stall_s"]
    print(
        json.dumps({"device": str(distributed.device()), **found, "stall_ratio": round(ratio, 4)})
    )


if __name__ == "__main__":
    main()
