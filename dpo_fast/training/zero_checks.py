"""Whether this machine and these ranks can do what `parallel` asks of ZeRO: ZeRO++, and files on disks."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dpo_fast.durable import first_line
from dpo_fast.errors import UserError
from dpo_fast.training import distributed
from dpo_fast.training.config import RunConfig
from dpo_fast.training.engine import zero_config

QUANTISED = ("zero_quantized_weights", "zero_quantized_gradients")
# DeepSpeed's names of the same options, which `parallel.deepspeed` may hold.
OFFLOADS = {"offload_optimizer": "offload_optimizer", "offload_param": "offload_parameters"}


def check_zero(config: RunConfig) -> None:
    """Check the options of ZeRO against devices, ranks, compilers and folders. Nothing is loaded.

    Raises:
        UserError: naming the option, its value and the remedy.
    """
    ranks = distributed.world_size()
    zero = zero_config(config)
    _check_groups(int(zero.get("zero_hpz_partition_size", 1)), ranks)
    for option in QUANTISED:
        if zero.get(option):
            _check_quantised(option, ranks)
    for name, option in OFFLOADS.items():
        offload = zero.get(name)
        if isinstance(offload, Mapping) and offload.get("device") == "nvme":
            _check_files(option, offload)


def _check_groups(size: int, ranks: int) -> None:
    """Raises UserError unless the ranks are whole groups of hpZ."""
    if ranks % size:
        fitting = [str(n) for n in range(2, ranks + 1) if ranks % n == 0]
        remedy = (
            f"set it to {' or '.join(fitting[-4:])}" if fitting else "remove it on a single rank"
        )
        raise UserError(
            f"parallel.zero_hpz_partition_size={size} does not divide the {ranks} rank"
            f"{'s' if ranks > 1 else ''}: every copy of the parameters needs so many; {remedy}"
        )


def _check_quantised(option: str, ranks: int) -> None:
    named = f"parallel.{option}=true"
    if not torch.cuda.is_available():
        raise UserError(f"{named}: DeepSpeed has it for GPUs only, and there is none; remove it")
    if fault := missing_op("QuantizerBuilder"):
        raise UserError(
            f"{named} needs DeepSpeed's quantizer, which it compiles here with nvcc: {fault}. Install the "
            "CUDA toolkit of this torch, or remove the option"
        )
    local = torch.cuda.device_count()
    if option == "zero_quantized_gradients" and (ranks <= local or ranks % local):
        raise UserError(
            f"{named} reduces within machines and then between them: it needs ranks on all {local} GPUs of "
            f"two or more machines, and there are {ranks} ranks; remove it"
        )


def _check_files(option: str, offload: Mapping[str, Any]) -> None:
    named, folder = f"parallel.{option}=nvme", Path(str(offload.get("nvme_path"))).absolute()
    if fault := missing_op("AsyncIOBuilder"):
        raise UserError(
            f"{named} needs DeepSpeed's async_io, which it compiles here: {fault}. Install libaio and "
            f"a C++ compiler (Debian: apt install libaio-dev g++), or set parallel.{option}=cpu"
        )
    there = next(each for each in (folder, *folder.parents) if each.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(
            f"parallel.nvme_path={folder}: {there} is no folder that can be written; name one on a fast "
            "disk of this machine"
        )


def missing_op(builder: str) -> str | None:
    """Why DeepSpeed cannot build one of its extensions here; None if it can."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # it is read with the first import
    from deepspeed.accelerator import get_accelerator

    found = get_accelerator().create_op_builder(builder)
    try:
        known = found is not None and type(found).__name__ != "NotImplementedBuilder"
        if known and found.is_compatible(verbose=False):
            return None
    except Exception as error:  # builders raise nearly anything where a tool is missing
        return first_line(error)
    return f"{builder.removesuffix('Builder')} is not compatible with this machine"
