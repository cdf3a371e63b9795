"""Peak memory of one call beyond its inputs and its outputs.

On a CPU in a process of its own per contender: what one leaves in the heap would hide the next one's
need.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import signal

import torch

from benchmarks import memory
from benchmarks.kernels.case import Case, Contender, Outputs

SMALL = {"T": 16, "V": 64}  # sizes of a first call, that loads what first calls load
PEAK_SECONDS = 600  # for the figure
GRACE_SECONDS = 10  # for the process to end by itself after it


def output_bytes(outputs: Outputs) -> int:
    return sum(x.numel() * x.element_size() for x in (outputs.values, *outputs.gradients))


def peak_mib(run, device: str) -> float:
    """Of a second call: the first has compiled, tuned and allocated its workspaces."""
    before = memory.used(device)
    memory.forget_peak(device)
    outputs = run()
    if device == "cuda":
        torch.cuda.synchronize()
    return (memory.peak(device) - before - output_bytes(outputs)) / memory.MIB


def preload(contenders: list[Contender]) -> None:
    """Name what the process that others are forked from imports. The first list counts: it stays."""
    modules = [__name__, "benchmarks.kernels.registry"]
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
        answer = (
            receiver.recv()
            if receiver.poll(PEAK_SECONDS)
            else f"no figure in {PEAK_SECONDS} seconds"
        )
    except EOFError:  # the process has died
        answer = None
    process.join(GRACE_SECONDS)
    process.kill()
    process.join()
    if answer is None and process.exitcode == -signal.SIGKILL:  # how memory ends on Linux
        raise memory.OutOfMemoryError("out of memory")
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
    from benchmarks.kernels.registry import OPERATIONS

    operation = OPERATIONS[case.op]
    contender = next(c for c in operation.contenders if c.name == name)
    # What is compiled is compiled for one shape: its first call is at the real one.
    first = case if contender.compiled else dataclasses.replace(case, **SMALL)
    contender.build(first, operation.inputs(first, 0))()
    run = contender.build(case, operation.inputs(case, 1))
    return max(0.0, peak_mib(run, "cpu"))
