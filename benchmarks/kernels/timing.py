"""Times, interleaved launch by launch: every contender once, then every contender again.

Before each launch a buffer larger than the last-level cache is written, so that nobody finds its
operands there because of who came before; every other round goes in reverse order. On a GPU the
clock is a pair of events, and the write also hides the launch; on a CPU it is perf_counter.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

FLUSH_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}
COPY_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}
SECONDS = {"cpu": 60.0, "cuda": 20.0}  # that a group's timed launches may take, within ROUNDS
ROUNDS = {"cpu": (3, 7), "cuda": (5, 25)}


def interleave(
    functions: dict[str, Callable[[int], object]], device: str, rounds: int | None = None
) -> dict[str, list[float]]:
    """Milliseconds of every call by name. Each function gets the number of its round.

    rounds: None for as many as SECONDS allows, within ROUNDS.
    """
    clock = _CudaClock() if device == "cuda" else _CpuClock()
    names, start = list(functions), time.perf_counter()
    least, most = (rounds, rounds) if rounds else ROUNDS[device]
    for number in range(most):
        if number >= least and time.perf_counter() - start > SECONDS[device]:
            break
        for name in names if number % 2 == 0 else reversed(names):
            clock.time(name, functions[name], number)
        clock.end_round()
    return clock.series


class _CpuClock:
    def __init__(self):
        self.series: dict[str, list[float]] = {}
        self.flush = torch.zeros(FLUSH_BYTES["cpu"] // 4)

    def time(self, name: str, function: Callable[[int], object], number: int) -> None:
        self.flush.zero_()
        start = time.perf_counter()
        result = function(number)
        self.series.setdefault(name, []).append(1e3 * (time.perf_counter() - start))
        del result  # freed outside of the time, as a training step would keep it

    def end_round(self) -> None:
        pass


class _CudaClock:
    """Waits for the device once a round: within one, launches queue behind the flush."""

    def __init__(self):
        self.series: dict[str, list[float]] = {}
        self.flush = torch.zeros(FLUSH_BYTES["cuda"] // 4, device="cuda")
        self.pending: list[tuple] = []

    def time(self, name: str, function: Callable[[int], object], number: int) -> None:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        start.record()
        function(number)
        end.record()
        self.pending.append((name, start, end))

    def end_round(self) -> None:
        torch.cuda.synchronize()
        for name, start, end in self.pending:
            self.series.setdefault(name, []).append(start.elapsed_time(end))
        self.pending.clear()


def copy(device: str) -> Callable[[int], object]:
    """A copy of COPY_BYTES, which reads and writes them: the bandwidth that a pass can hope for."""
    source = torch.zeros(COPY_BYTES[device] // 4, device=device)
    target = torch.empty_like(source)
    return lambda number: target.copy_(source)
