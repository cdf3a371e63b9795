"""What a run changes in its process, put back afterwards: a notebook or a script goes on with it."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import sys
import warnings
from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist

from dpo_fast.training import data_ranks, distributed

LIBRARIES = ("DeepSpeed", "deepspeed", "torch.distributed")


@contextlib.contextmanager
def as_found() -> Iterator[None]:
    """Afterwards the process is as it was: environment, process group, random states, settings.

    Inside, PyTorch computes as in a new process, whatever surrounds the call: without autocast, with
    gradients, and with fp32 as the default dtype.

    Of several ranks the process group stays until the process ends: they cannot find each other twice at
    one address. Signal handlers are the engine's own care (`training/signals.py`).
    """
    environment, grouped = dict(os.environ), dist.is_initialized()
    hook = sys.excepthook  # a process group puts one round it, and leaves it
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    states = (random.getstate(), np.random.get_state(), torch.random.get_rng_state())
    # Nothing asks for a GPU here: a process that has none in use yet may still want to fork.
    on_gpu = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    levels = {name: logging.getLogger(name).level for name in (None, *LIBRARIES)}
    disabled, told = logging.root.manager.disable, _told()
    try:
        with warnings.catch_warnings(), _as_in_a_new_process():
            yield
    finally:
        if not grouped and distributed.world_size() == 1:
            _leave_group()
            _put_back(environment)
            sys.excepthook = hook
        torch.set_default_dtype(dtype)
        torch.set_num_threads(threads)
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.random.set_rng_state(states[2])
        if on_gpu is not None:
            torch.cuda.set_rng_state_all(on_gpu)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        logging.disable(disabled)
        _tell(*told)


@contextlib.contextmanager
def _as_in_a_new_process() -> Iterator[None]:
    torch.set_default_dtype(torch.float32)
    with contextlib.ExitStack() as inside:
        inside.enter_context(torch.inference_mode(False))
        inside.enter_context(torch.enable_grad())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                inside.enter_context(torch.autocast(kind, enabled=False))
        yield


def _told() -> tuple[int, bool, bool]:
    """What transformers and datasets tell: verbosity, and whether each shows progress."""
    import datasets
    import transformers

    logs = transformers.utils.logging
    bars = not datasets.are_progress_bars_disabled()
    return logs.get_verbosity(), logs.is_progress_bar_enabled(), bars


def _tell(verbosity: int, progress: bool, bars: bool) -> None:
    import datasets
    import transformers

    logs = transformers.utils.logging
    logs.set_verbosity(verbosity)
    (logs.enable_progress_bar if progress else logs.disable_progress_bar)()
    (datasets.enable_progress_bars if bars else datasets.disable_progress_bars)()


def _leave_group() -> None:
    """Leave the group of this process alone, and have DeepSpeed forget it: the next run makes another."""
    distributed.leave_distributed()
    data_ranks.forget()
    import deepspeed.comm.comm as comm
    from deepspeed.utils import groups

    comm.cdb = None
    groups._WORLD_GROUP = groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = groups.mesh_device = None
    for table in (
        groups._EXPERT_PARALLEL_GROUP,
        groups._EXPERT_PARALLEL_GROUP_RANKS,
        groups._EXPERT_DATA_PARALLEL_GROUP,
        groups._EXPERT_DATA_PARALLEL_GROUP_RANKS,
        groups._ALL_TO_ALL_GROUP,
    ):
        table.clear()


def _put_back(environment: dict[str, str]) -> None:
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)
