"""Processes and ranks: one process alone, torchrun, deepspeed and SLURM look the same from here on.

Who this process is, joining and leaving the group, and what ranks agree on.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import os
import re
import socket
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dpo_fast.durable import first_line
from dpo_fast.errors import LostPeer, UserError
from dpo_fast.training import environment
from dpo_fast.training.launchers import watch_launchers
from dpo_fast.training.peers import REMEDY, Peers

T = TypeVar("T")
FOREVER = timedelta(days=30)
# What gloo and nccl say when another rank has gone; gloo raises a plain RuntimeError.
PEER_ERRORS = re.compile("gloo|NCCL|[Tt]imed out waiting|Connection (closed|reset)|Broken pipe")
_peers: list[Peers] = []
_turns = itertools.count()  # calls of `_first`, which every rank makes in the same order


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
    watch_launchers()
    if "RANK" not in os.environ:
        environment.tell_unused_tasks()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    elif missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise UserError(
            f"rank {rank()} of {world_size()} does not know where to find the others: export "
            f"{' and '.join(missing)}, the machine of rank 0 and a free port there. Under SLURM: "
            'export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1) '
            "MASTER_PORT=29500"
        )
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        environment.find_gpu(torch.cuda.device_count())
        torch.cuda.set_device(device())
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        share_cores()
        leave_out_shm_comm()
    import deepspeed

    if not dist.is_initialized():
        timeout = timedelta(minutes=timeout_minutes)
        # DeepSpeed makes more groups, and asks for no time-out: they have torch's default.
        dist.distributed_c10d.default_pg_timeout = timeout
        dist.distributed_c10d.default_pg_nccl_timeout = timeout
        with joining(timeout_minutes):
            deepspeed.init_distributed(
                dist_backend="nccl" if on_gpu else "gloo", timeout=timeout, auto_mpi_discovery=False
            )
        watch_peers(timeout)


def leave_out_shm_comm() -> None:
    """Keep DeepSpeed from compiling an all-reduce for inference on a CPU.

    Nothing here calls it, and a killed build leaves a lock that every later process waits for. On a GPU
    DeepSpeed does not ask for it, and naming it would run a compiler to see what else could be built.
    """
    import deepspeed  # reads DS_ACCELERATOR when it is imported

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


@contextlib.contextmanager
def joining(timeout_minutes: float) -> Iterator[None]:
    """Raises UserError if the ranks do not find each other."""
    try:
        yield
    except dist.DistError as error:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        if "EADDRINUSE" in str(error):
            raise UserError(
                f"rank {rank()} of {world_size()} cannot listen at {place}: another program has that port, "
                "perhaps another run; set another MASTER_PORT for all ranks of this one"
            ) from None
        raise UserError(
            f"rank {rank()} of {world_size()} has not found the others at {place}: {first_line(error)} "
            "Look at what the other ranks say, whether MASTER_ADDR is the machine of rank 0, and whether "
            f"parallel.timeout_minutes={timeout_minutes:g} is enough for all to start"
        ) from None


def watch_peers(silence: timedelta) -> None:
    """Notice from now on when another rank is lost, and end. A process that ends says so by itself."""
    if world_size() > 1:
        store = dist.distributed_c10d._get_default_store()
        _peers.append(Peers(rank(), store, silence.total_seconds()))
        atexit.register(_leave_peers)


def _leave_peers() -> None:
    """At the end of a script of the user's, too: an exception there has been printed by now."""
    if _peers and (error := getattr(sys, "last_value", None)) is not None:
        _peers[-1].fail(f"{type(error).__name__}: {error}", 1)
    elif _peers:
        _peers[-1].leave()
    _peers.clear()


def peers() -> Peers | None:
    """The watch over the other ranks, if there are any."""
    return _peers[-1] if _peers else None


def end_at_once(reason: str, code: int) -> None:
    """End this process from any thread: the main one waits where nothing reaches it."""
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        with contextlib.suppress(OSError):
            os.write(2, f"dpo-fast: {reason}\n".encode())
    if _peers:
        _peers[-1].fail(reason, code)
    os._exit(code)


@contextlib.contextmanager
def collective_errors() -> Iterator[None]:
    """Raises LostPeer in place of the error of a collective whose other ranks are gone or silent."""
    try:
        yield
    except RuntimeError as error:
        if not PEER_ERRORS.search(str(error)) and not isinstance(error, dist.DistError):
            raise
        raise LostPeer(
            "another rank is gone, or was silent for longer than parallel.timeout_minutes, as all are when "
            f"a machine sleeps: {first_line(error)}. {REMEDY}"
        ) from error


def leave_distributed() -> None:
    """Leave the process group when a run is over; nccl warns otherwise."""
    _leave_peers()
    if dist.is_initialized():
        dist.destroy_process_group()


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def capacity(device: torch.device) -> int:
    """Bytes of the device's memory; for a CPU those of the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def at_most(ranks: int) -> int:
    """So many ranks, or as many as this machine has GPUs where it has some and these are fewer."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return min(ranks, gpus) if gpus else ranks


def share_cores() -> None:
    """Divide a machine's cores among its ranks; with more threads than cores they wait for each other."""
    if "OMP_NUM_THREADS" not in os.environ:
        local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        torch.set_num_threads(max(cores() // local, 1))


def adopt_slurm() -> None:
    """Take rank and world size from srun or mpirun, and check them: `environment.adopt`."""
    environment.adopt()


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def main_first(name: str, work: Callable[[], T]) -> T:
    """Do the work on the first rank of each node, and give its result to the node's other ranks.

    Collective. The others wait in the store and not in a collective of the backend, so no timeout ends
    long work. A UserError of the first rank is raised on all; they exit with code 2 if it fails otherwise.

    name: of the work, for the key in the store. work: its result is anything that JSON can hold.
    """
    first_of_node = int(os.environ.get("LOCAL_RANK", rank())) == 0
    return _first(f"{name}/{int(os.environ.get('GROUP_RANK', 0))}", first_of_node, work)


def main_waits(name: str, work: Callable[[], T]) -> T:
    """As `main_first`, but on rank 0 of all nodes."""
    return _first(name, is_main(), work)


def _first(name: str, mine: bool, work: Callable[[], T]) -> T:
    """Do the work if it is this rank's, or wait for its result."""
    if world_size() == 1:
        return work()
    store = dist.distributed_c10d._get_default_store()
    # The turn tells apart two runs in one process group: the first one's key is still there.
    key = f"dpo_fast/{next(_turns)}/{name}"
    if mine:
        try:
            result = work()
        except UserError as error:
            store.set(key, json.dumps({"error": str(error)}))
            raise
        except BaseException:
            store.set(key, "failed")
            raise
        store.set(key, json.dumps({"result": result}))
        return result
    store.wait([key], FOREVER)
    if (text := store.get(key)) == b"failed":
        raise SystemExit(2)  # the first rank has said why
    outcome = json.loads(text)
    if "error" in outcome:
        raise UserError(outcome["error"])
    return outcome["result"]


def await_all(name: str) -> None:
    """Wait until every rank has come here, however long the others take. Collective.

    In the store and not in a collective of the backend, which has a time-out. name: for its key there.
    """
    if world_size() == 1:
        return
    store = dist.distributed_c10d._get_default_store()
    key = f"dpo_fast/{next(_turns)}/{name}"
    if store.add(f"{key}/came", 1) == world_size():
        store.set(f"{key}/all", "")
    store.wait([f"{key}/all"], FOREVER)


def from_main(work: Callable[[], T]) -> T:
    """Do `work` on rank 0 and return its result on every rank. Collective.

    Folders may look different from other machines, so one rank decides. Its UserError is raised on every
    rank: none waits for it.
    """
    if world_size() == 1:
        return work()
    outcome: list = [None, None]
    if is_main():
        try:
            outcome[0] = work()
        except UserError as error:
            outcome[1] = str(error)
    dist.broadcast_object_list(outcome, src=0)
    result, message = outcome
    if message is not None:
        raise UserError(message)
    return result


def gathered(value: T, group=None) -> list[T]:
    """The value of every rank, in the order of the ranks. Collective. group: default: of all."""
    if world_size() == 1:
        return [value]
    values: list = [None] * world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank. Collective."""
    return bool(largest(flag))


def largest(value: float) -> float:
    """The largest value of all ranks. Collective."""
    if world_size() == 1:
        return value
    values = torch.tensor(value, dtype=torch.float64, device=device())
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values.item()


def joined(mine: list[T]) -> list[T]:
    """The lists of all ranks, one after the other. Collective."""
    return list(itertools.chain.from_iterable(gathered(mine)))


def all_sum(values: Tensor) -> Tensor:
    """The sum over all ranks, in place. Collective. Another trainer may have made the group, or none."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values
