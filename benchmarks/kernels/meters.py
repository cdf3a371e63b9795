"""Time and peak memory of a call.

Times are interleaved: every function once, then every function again, backwards in every other round.
Before each call a buffer larger than the last-level cache is written, so that nobody profits from what the
call before left there. On a GPU the clock is a pair of events, and the write hides the launch. On a CPU it
is perf_counter.

Memory is the peak of one call beyond its inputs and outputs. On a CPU each contender is measured in a
process of its own, because the heap that one leaves behind would hide the need of the next.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import signal
import time
from collections.abc import Callable

import torch

from benchmarks.kernels import operations
from benchmarks.kernels.case import Case, Contender, Outputs
from benchmarks.machine import (
    MIB,
    OutOfMemoryError,
    memory_used,
    peak_memory,
    reset_peak_memory,
    synchronize,
)

FLUSH_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}
COPY_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}
SECONDS = {"cpu": 60.0, "cuda": 20.0}  # for the timed calls of a setting, within ROUNDS
ROUNDS = {"cpu": (3, 7), "cuda": (5, 25)}
SMALL = {"T": 16, "V": 64}  # sizes of a first call, which loads what first calls load
PEAK_SECONDS = 600  # for a process to measure its peak
GRACE_SECONDS = 10  # for it to end afterwards


def interleave(
    functions: dict[str, Callable[[int], object]],
    device: str,
    rounds: int | None = None,
    *,
    seconds: float | None = None,
    tell: Callable[[dict[str, float]], None] = lambda ms: None,
    before: Callable[[str], None] = lambda name: None,
    careful: bool = False,
) -> dict[str, list[float]]:
    """Milliseconds of every call, by name. A function gets the number of its round.

    rounds: None for as many as SECONDS allows, within ROUNDS.
    seconds: that there are; the least of the rounds take what they take.
    tell: takes the milliseconds of a round as it ends.
    before: takes a name before its call, if `careful`. Then a call is waited for before the next is told.
    """
    clock = _CudaClock() if device == "cuda" else _CpuClock()
    names, start = list(functions), time.perf_counter()
    least, most = (rounds, rounds) if rounds else ROUNDS[device]
    limit = min(SECONDS[device], SECONDS[device] if seconds is None else seconds)
    for number in range(most):
        if number >= least and time.perf_counter() - start > limit:
            break
        for name in names if number % 2 == 0 else reversed(names):
            if careful:
                before(name)
            clock.time(name, functions[name], number)
            if careful:
                synchronize(device)
        clock.end_round()
        tell({name: float(f"{clock.series[name][-1]:.6g}") for name in names})
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
        del result  # freed after the clock stopped: a training step would keep it

    def end_round(self) -> None:
        pass


class _CudaClock:
    """Waits for the device once a round. Within a round, launches queue behind the flush."""

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
    """A copy of COPY_BYTES, which are read and written: the bandwidth that a pass can reach."""
    source = torch.zeros(COPY_BYTES[device] // 4, device=device)
    target = torch.empty_like(source)
    return lambda number: target.copy_(source)


def output_bytes(outputs: Outputs) -> int:
    return sum(x.numel() * x.element_size() for x in (outputs.values, *outputs.gradients))


def peak_mib(run, device: str) -> float:
    """Peak of a call in MiB beyond inputs and outputs. An earlier call has compiled and tuned."""
    before = memory_used(device)
    reset_peak_memory(device)
    outputs = run()
    synchronize(device)
    return (peak_memory(device) - before - output_bytes(outputs)) / MIB


def preload(contenders: list[Contender]) -> None:
    """Name the modules that the fork server imports. Only the first call of a process counts."""
    modules = [__name__]
    for contender in contenders:
        modules += contender.package.heavy if contender.package else ()
    if any(contender.compiled for contender in contenders):
        modules.append("torch._dynamo")
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(dict.fromkeys(modules)))


def cpu_peak_mib(contender: Contender, case: Case) -> float:
    """`peak_mib` in a fresh process, forked from a server that has only imported the libraries."""
    context = multiprocessing.get_context("forkserver")
    receiver, sender = context.Pipe(duplex=False)
    arguments = (sender, contender.name, case, torch.get_num_threads(), operations.added())
    process = context.Process(target=_child, args=arguments)
    process.start()
    sender.close()
    try:
        late = f"no figure in {PEAK_SECONDS} seconds"
        answer = receiver.recv() if receiver.poll(PEAK_SECONDS) else late
    except EOFError:  # the process has died
        answer = None
    process.join(GRACE_SECONDS)
    process.kill()
    process.join()
    if answer is None and process.exitcode == -signal.SIGKILL:  # Linux does so when memory ends
        raise OutOfMemoryError("out of memory")
    if not isinstance(answer, float):
        raise RuntimeError(answer or f"its process ended with exit code {process.exitcode}")
    return answer


def _child(sender, name: str, case: Case, threads: int, modules: list[str]) -> None:
    try:
        for module in modules:
            operations.add(module)
        torch.set_num_threads(threads)
        sender.send(_resident_peak(name, case))
    except Exception as error:
        sender.send(f"{type(error).__name__}: {error}")


def _resident_peak(name: str, case: Case) -> float:
    operation = operations.OPERATIONS[case.op]
    contender = next(c for c in operation.contenders if c.name == name)
    # torch.compile compiles for one shape: its first call must have the real one.
    first = case if contender.compiled else dataclasses.replace(case, **SMALL)
    contender.build(first, operation.inputs(first, 0))()
    run = contender.build(case, operation.inputs(case, 1))
    return max(0.0, peak_mib(run, "cpu"))
