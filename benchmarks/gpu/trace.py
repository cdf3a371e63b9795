"""One training step of ours under PyTorch's profiler: where its time goes, on device and host."""

from __future__ import annotations

import functools
import time
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.shapes import device
from benchmarks.machine import synchronize

MOST = 25  # names in a list
RUNS = {
    False: {
        "0.5B, 8 pairs at a time": "--model qwen2.5-0.5b --micro-batch-size 8",
        "0.5B, 32 pairs at a time": "--model qwen2.5-0.5b --micro-batch-size 32",
    },
    True: {"quick": "--quick"},
}


def items(rehearse: bool) -> dict:
    return {name: functools.partial(trace, text.split()) for name, text in RUNS[rehearse].items()}


def trace(arguments: list[str]) -> dict:
    """The last step of a run of the packed layout with stored reference."""
    from benchmarks.train import ours
    from benchmarks.train.options import parse
    from benchmarks.train.run import run

    found, step = {}, ours.Ours.step

    def traced(self, number: int) -> float:
        if number < self.task.steps - 1:
            return step(self, number)
        activities = [ProfilerActivity.CPU]
        if device() == "cuda":
            activities.append(ProfilerActivity.CUDA)
        synchronize(device())
        start = time.perf_counter()
        with profile(activities=activities) as seen:
            loss = step(self, number)
            synchronize(device())
            found["seconds_with_profiler"] = time.perf_counter() - start
        found.update(shares(seen))
        return loss

    only = ["--only", "dpo_fast packed, cached", "--rounds", "3", "--no-memory"]
    with mock.patch.object(ours.Ours, "step", traced):
        run(parse([*arguments, *only]))
    return found | {"restart": True}  # a process group is joined once in a process


def shares(seen: profile) -> dict:
    """Milliseconds by name: kernels on the device, operations on the host by their own time."""
    events = seen.key_averages()
    kernels = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
    host = [e for e in events if e.device_type == torch.autograd.DeviceType.CPU]
    by_device = sorted(kernels, key=lambda e: -e.self_device_time_total)[:MOST]
    by_host = sorted(host, key=lambda e: -e.self_cpu_time_total)[:MOST]
    return {
        "device_ms": sum(e.self_device_time_total for e in kernels) / 1e3,
        "kernels": sum(e.count for e in kernels),
        "host_ms": sum(e.self_cpu_time_total for e in host) / 1e3,
        "on_device": [[e.key[:90], e.count, e.self_device_time_total / 1e3] for e in by_device],
        "on_host": [[e.key[:90], e.count, e.self_cpu_time_total / 1e3] for e in by_host],
    }
