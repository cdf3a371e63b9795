"""Peak memory of one run beyond its inputs and its outputs.

On a GPU the allocator counts. On a CPU the kernel does: the largest resident size, in a process of its
own per contender, since what one run leaves in the heap would hide the next one's need.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import resource
import signal
from pathlib import Path

import torch

from benchmarks.case import Case, Contender, Outputs

MIB = 1 << 20
SMALL = {"T": 16, "V": 64}  # sizes of a first call, that loads what first calls load
SECONDS = 600  # for the figure
GRACE_SECONDS = 10  # for the process to end by itself after it


class OutOfMemoryError(RuntimeError):
    """A contender that does not fit."""


def output_bytes(outputs: Outputs) -> int:
    return sum(x.numel() * x.element_size() for x in (outputs.values, *outputs.gradients))


def release(device: str) -> None:
    """Give back what nobody refers to."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def is_full(error: Exception) -> bool:
    """Whether an exception says that memory has run out, on either device."""
    if isinstance(error, (OutOfMemoryError, torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def cuda_peak_mib(run) -> float:
    """Of a second call: the first has compiled, tuned and allocated its workspaces."""
    release("cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    outputs = run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before - output_bytes(outputs)) / MIB


def preload(contenders: list[Contender]) -> None:
    """Name what the process that others are forked from imports. The first list counts: it stays."""
    modules = ["benchmarks.memory", "benchmarks.registry"]
    for contender in contenders:
        modules += contender.package.heavy if contender.package else ()
    if any(contender.compiled for contender in contenders):
        modules.append("torch._dynamo")
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(dict.fromkeys(modules)))


def cpu_peak_mib(contender: Contender, case: Case) -> float:
    """In a fresh process, forked from one that has imported the libraries and done nothing else."""
    context = multiprocessing.get_context("forkserver")
    receiver, sender = context.Pipe(duplex=False)
    arguments = (sender, contender.name, case, torch.get_num_threads())
    process = context.Process(target=_child, args=arguments)
    process.start()
    sender.close()
    try:
        answer = receiver.recv() if receiver.poll(SECONDS) else f"no figure in {SECONDS} seconds"
    except EOFError:  # the process has died
        answer = None
    process.join(GRACE_SECONDS)
    process.kill()
    process.join()
    if answer is None and process.exitcode == -signal.SIGKILL:  # how memory ends on Linux
        raise OutOfMemoryError("out of memory")
    if not isinstance(answer, float):
        raise RuntimeError(answer or f"its process ended with exit code {process.exitcode}")
    return answer


def _child(sender, name: str, case: Case, threads: int) -> None:
    try:
        torch.set_num_threads(threads)
        sender.send(_resident_peak(name, case))
    except Exception as error:
        sender.send(f"{type(error).__name__}: {error}")


def _resident_peak(name: str, case: Case) -> float:
    from dataclasses import replace

    from benchmarks.registry import OPERATIONS

    operation = OPERATIONS[case.op]
    contender = next(c for c in operation.contenders if c.name == name)
    # What is compiled is compiled for one shape: its first call is at the real one.
    first = case if contender.compiled else replace(case, **SMALL)
    contender.build(first, operation.inputs(first, 0))()
    run = contender.build(case, operation.inputs(case, 1))
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else the peak hides in what the heap has kept
    before = resident()
    Path("/proc/self/clear_refs").write_text("5")  # the largest resident size starts again here
    outputs = run()
    return max(0.0, (largest_resident() - before - output_bytes(outputs)) / MIB)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def largest_resident() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM")
