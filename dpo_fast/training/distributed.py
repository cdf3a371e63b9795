"""Processes and ranks: one process alone, torchrun, deepspeed and SLURM look the same from here on."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")
FOREVER = timedelta(days=30)


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main() -> bool:
    return rank() == 0


def device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def init_distributed(timeout_minutes: float = 30.0) -> None:
    """Join the process group: nccl on GPUs, gloo on CPUs. A process started alone is a group of one."""
    adopt_slurm()
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(device())
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        share_cores()
    leave_out_shm_comm()
    import deepspeed

    if not dist.is_initialized():
        deepspeed.init_distributed(
            dist_backend="nccl" if on_gpu else "gloo",
            timeout=timedelta(minutes=timeout_minutes),
            auto_mpi_discovery=False,
        )


def leave_out_shm_comm() -> None:
    """Keep DeepSpeed from compiling an all-reduce for inference on a CPU. Nothing here calls it, and a
    build that is killed leaves a lock behind which every later process waits for, for ever."""
    import deepspeed  # reads DS_ACCELERATOR when it is imported

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def leave_distributed() -> None:
    """Part from the process group, as nccl wishes, when a run is over."""
    if dist.is_initialized():
        dist.destroy_process_group()


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def share_cores() -> None:
    """Ranks on one machine share its cores; with more threads than cores they wait for each other."""
    if "OMP_NUM_THREADS" not in os.environ:
        local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        torch.set_num_threads(max(cores() // local, 1))


def adopt_slurm() -> None:
    """srun tells ranks by its own names; MASTER_ADDR and MASTER_PORT must be exported beside them."""
    if "RANK" not in os.environ and int(os.environ.get("SLURM_NTASKS", 1)) > 1:
        names = {"RANK": "PROCID", "LOCAL_RANK": "LOCALID", "WORLD_SIZE": "NTASKS"}
        os.environ |= {ours: os.environ[f"SLURM_{theirs}"] for ours, theirs in names.items()}


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def main_first(name: str, work: Callable[[], T]) -> T:
    """Rank 0 of each node does the work while its others wait; then they do it, finding it done.

    The waiting goes through the store, not through a collective, so it cannot time out while rank 0
    is still at it. If rank 0 fails, the others fail with its message.
    """
    if world_size() == 1:
        return work()
    store = dist.distributed_c10d._get_default_store()
    first_of_node = int(os.environ.get("LOCAL_RANK", rank())) == 0
    key = f"dpo_fast/{name}/{int(os.environ.get('GROUP_RANK', 0))}"
    if first_of_node:
        try:
            result = work()
        except BaseException as error:
            store.set(key, f"failed: {error}")
            raise
        store.set(key, "done")
        return result
    store.wait([key], FOREVER)
    state = store.get(key).decode()
    if state != "done":
        raise SystemExit(2)  # rank 0 has said why
    return work()


def any_rank(*flags: bool) -> list[bool]:
    """Whether each flag is set on any rank. One small all-reduce."""
    if world_size() == 1:
        return list(flags)
    values = torch.tensor([int(flag) for flag in flags], device=device())
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return [bool(value) for value in values.tolist()]


def largest(value: float) -> float:
    """Of the values of all ranks. Collective."""
    if world_size() == 1:
        return value
    values = torch.tensor(value, dtype=torch.float64, device=device())
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values.item()
