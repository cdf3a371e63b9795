"""What launchers say in the environment: which rank this process is, of how many.

torchrun, deepspeed, accelerate and `--nproc` set RANK, LOCAL_RANK and WORLD_SIZE. srun and mpirun have
names of their own, which are taken over. A batch script of SLURM's has the number of tasks of its job,
too, but is one process: only srun starts the others, and only srun sets SLURM_STEP_NUM_TASKS.
"""

from __future__ import annotations

import os
import sys

from dpo_fast.errors import UserError
from dpo_fast.training.launchers import LAUNCHER
from dpo_fast.wording import quoted

OURS = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
# Of each launcher its names for these three. The last says how many there are.
FOREIGN = {
    "srun": ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS"),
    "mpirun": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE"),
    "mpiexec": ("PMI_RANK", "MPI_LOCALRANKID", "PMI_SIZE"),
}
LEAST = {"WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": 1}  # of others 0
NUMBERS = (*OURS, "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_PORT")
LARGEST_PORT = 65535
SAME_GPUS = (LAUNCHER, "TORCHELASTIC_RUN_ID")  # of launchers whose ranks see the same GPUs
REMEDY = (
    "a launcher sets RANK, LOCAL_RANK and WORLD_SIZE: set all of them, or unset them for one rank"
)


def adopt() -> None:
    """Take rank and world size from srun or mpirun, and check what is set.

    MASTER_ADDR and MASTER_PORT are the user's to export there.

    Raises:
        UserError: a variable is no number, does not go with the others, or lacks them.
    """
    for name in OURS:
        if os.environ.get(name) == "":  # set by a script whose own variable was empty
            del os.environ[name]
    for launcher, names in FOREIGN.items():
        if "RANK" not in os.environ and _number(names[-1], 1, 1) > 1:
            _take(launcher, names)
    check()


def tell_unused_tasks() -> None:
    """A line where SLURM has several tasks for this job, and srun has not started them."""
    tasks = os.environ.get("SLURM_NTASKS", "")
    if "SLURM_STEP_NUM_TASKS" not in os.environ and tasks.isdecimal() and int(tasks) > 1:
        print(
            f"dpo-fast: this job has {tasks} tasks of SLURM's, and this is one rank: srun, torchrun or "
            "--nproc start more",
            file=sys.stderr,
        )


def _take(launcher: str, names: tuple[str, ...]) -> None:
    if missing := [name for name in names if not os.environ.get(name)]:
        raise UserError(
            f"{names[-1]}={os.environ[names[-1]]} is of {launcher}, and {' and '.join(missing)} "
            f"{'are' if len(missing) > 1 else 'is'} not set: let it pass on its environment"
        )
    os.environ |= {ours: os.environ[theirs] for ours, theirs in zip(OURS, names)}


def find_gpu(gpus: int) -> None:
    """Make LOCAL_RANK the number of this rank's GPU among those that it sees, as DeepSpeed takes it.

    Under `srun --gpus-per-task=1`, and in pods, a rank sees its own alone: it is a machine of its own then,
    and so does by itself what the first rank of a machine does for the others.

    Raises:
        UserError: it sees several and does not know which is its own, or its own is not among them.
    """
    local = _number("LOCAL_RANK", -1, 0)
    if local < 0 and gpus > 1:
        raise UserError(
            f"RANK={os.environ['RANK']} does not know which of {gpus} GPUs is its own: set LOCAL_RANK, the "
            "number of the rank on its machine, or let each rank see one alone (CUDA_VISIBLE_DEVICES)"
        )
    shared = any(name in os.environ for name in SAME_GPUS)
    if local >= gpus and (gpus > 1 or shared):
        raise UserError(
            f"LOCAL_RANK={local}, and this machine shows {gpus} GPUs: start as many ranks on it, or look "
            "at CUDA_VISIBLE_DEVICES"
        )
    if local < 0 or local >= gpus:
        os.environ |= {"LOCAL_RANK": "0", "GROUP_RANK": os.environ["RANK"]}


def check() -> None:
    """Raises UserError for a variable that is no number, does not go with the others, or lacks them."""
    for name in NUMBERS:
        _number(name, 0, LEAST.get(name, 0))
    if _number("MASTER_PORT", 1, 1) > LARGEST_PORT:
        raise UserError(f"MASTER_PORT={os.environ['MASTER_PORT']} is above {LARGEST_PORT}")
    world = _number("WORLD_SIZE", 1, 1)
    for name, other in (("RANK", "WORLD_SIZE"), ("WORLD_SIZE", "RANK"), ("LOCAL_RANK", "RANK")):
        alone = name in os.environ and other not in os.environ
        if alone and _number(name, 0, 0) > (name == "WORLD_SIZE"):
            raise UserError(f"{name}={os.environ[name]} is set and {other} is not: {REMEDY}")
    for name, other, most in (
        ("RANK", "WORLD_SIZE", world),
        ("LOCAL_RANK", "LOCAL_WORLD_SIZE", _number("LOCAL_WORLD_SIZE", world, 1)),
    ):
        if _number(name, 0, 0) >= most:
            named = other if other in os.environ else "WORLD_SIZE"
            raise UserError(
                f"{name}={os.environ[name]} with {named}={most}: ranks are counted from 0; {REMEDY}"
            )


def _number(name: str, default: int, least: int) -> int:
    """The value of a variable. Raises UserError if it is no number, or too low."""
    text = os.environ.get(name)
    if text is None:
        return default
    if not (text.strip().isdecimal() and text.isascii() and len(text) < 10):
        raise UserError(f"{name}={quoted(text)} in the environment is no number of ranks; {REMEDY}")
    if int(text) < least:
        raise UserError(f"{name}={text} in the environment is below {least}; {REMEDY}")
    return int(text)
