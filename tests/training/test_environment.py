"""What a launcher says in the environment: taken over, checked, and told where it is half-set."""

import os

import pytest

from dpo_fast.errors import UserError
from dpo_fast.training import environment

NAMES = (
    *environment.NUMBERS,
    *environment.SAME_GPUS,
    *sum(environment.FOREIGN.values(), ()),
    "SLURM_NTASKS",
)
BATCH = {"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}  # a script of sbatch's
MPI = {"OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_SIZE": "8"}
FOUND = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8"}


@pytest.fixture
def variables(monkeypatch):
    """Set these variables and no others of launchers."""

    def put(values: dict[str, str]) -> None:
        for name in NAMES:
            monkeypatch.setenv(name, "")  # so that what is adopted is forgotten afterwards
            monkeypatch.delenv(name)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return put


def ours() -> dict[str, str]:
    return {name: os.environ[name] for name in environment.OURS if name in os.environ}


@pytest.mark.parametrize(
    "values, found",
    [
        ({}, {}),
        (BATCH | {"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1"}, FOUND),
        (MPI, FOUND),
        ({"PMI_RANK": "5", "MPI_LOCALRANKID": "1", "PMI_SIZE": "8"}, FOUND),
        (BATCH, {}),  # without srun it is one process
        (BATCH | {"SLURM_STEP_NUM_TASKS": "1"}, {}),  # srun --pty bash
        (BATCH | {"SLURM_STEP_NUM_TASKS": "2"} | FOUND, FOUND),  # srun torchrun
        ({"WORLD_SIZE": "1"}, {"WORLD_SIZE": "1"}),
        ({"WORLD_SIZE": "", "RANK": "", "LOCAL_RANK": ""}, {}),
        ({"RANK": "1", "WORLD_SIZE": "2"}, {"RANK": "1", "WORLD_SIZE": "2"}),  # one in each pod
    ],
)
def test_ranks_are_taken_from_what_starts_them(variables, values, found):
    variables(values)
    environment.adopt()
    assert ours() == found


@pytest.mark.parametrize(
    "values, words",
    [
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK='x' in the environment is no number"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK='-1' in the environment is no number"),
        ({"RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE='two' in the environment is no number"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE=0 in the environment is below 1"),
        ({"RANK": "0", "WORLD_SIZE": "9" * 40}, "is no number"),
        ({"RANK": "0", "WORLD_SIZE": "\u0662"}, "is no number"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 with WORLD_SIZE=2: ranks are counted from 0"),
        ({"RANK": "1"}, "RANK=1 is set and WORLD_SIZE is not"),
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE=4 is set and RANK is not"),
        ({"LOCAL_RANK": "3"}, "LOCAL_RANK=3 is set and RANK is not"),
        (FOUND | {"LOCAL_WORLD_SIZE": "1"}, "LOCAL_RANK=1 with LOCAL_WORLD_SIZE=1"),
        (FOUND | {"MASTER_PORT": "http"}, "MASTER_PORT='http' in the environment is no number"),
        (FOUND | {"MASTER_PORT": "70000"}, "MASTER_PORT=70000 is above 65535"),
        (FOUND | {"GROUP_RANK": "a"}, "GROUP_RANK='a'"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "of srun, and SLURM_PROCID and SLURM_LOCALID are not set"),
        (MPI | {"OMPI_COMM_WORLD_LOCAL_RANK": ""}, "OMPI_COMM_WORLD_LOCAL_RANK is not set"),
    ],
)
def test_what_is_half_set_is_told(variables, values, words):
    variables(values)
    with pytest.raises(UserError) as error:
        environment.adopt()
    assert words in str(error.value)


def test_one_rank_of_a_job_with_many_tasks_says_so(variables, capsys):
    variables(BATCH)
    environment.tell_unused_tasks()
    assert "8 tasks of SLURM's, and this is one rank: srun, torchrun" in capsys.readouterr().err
    for values in ({"SLURM_NTASKS": "1"}, BATCH | {"SLURM_STEP_NUM_TASKS": "1"}, {}):
        variables(values)
        environment.tell_unused_tasks()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "local, gpus, launcher, found",
    [
        ("7", 8, None, "7"),
        ("0", 1, environment.LAUNCHER, "0"),
        ("3", 1, None, "0"),  # srun --gpus-per-task=1
        (None, 1, None, "0"),  # a pod for each
    ],
)
def test_a_rank_has_a_gpu_of_its_own(variables, local, gpus, launcher, found):
    two = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": local, launcher: "1"}
    variables({name: value for name, value in two.items() if name and value})
    environment.find_gpu(gpus)
    assert os.environ["LOCAL_RANK"] == found
    # A rank that sees its GPU alone waits for no other one of its machine.
    assert os.environ.get("GROUP_RANK") == (None if local == found else "5")


@pytest.mark.parametrize(
    "local, gpus, launcher, words",
    [
        (None, 8, None, "RANK=5 does not know which of 8 GPUs is its own: set LOCAL_RANK"),
        ("7", 4, None, "LOCAL_RANK=7, and this machine shows 4 GPUs"),
        ("1", 1, environment.LAUNCHER, "LOCAL_RANK=1, and this machine shows 1 GPUs"),
        ("1", 1, "TORCHELASTIC_RUN_ID", "LOCAL_RANK=1, and this machine shows 1 GPUs"),
    ],
)
def test_a_rank_without_a_gpu_is_told(variables, local, gpus, launcher, words):
    two = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": local, launcher: "1"}
    variables({name: value for name, value in two.items() if name and value})
    with pytest.raises(UserError) as error:
        environment.find_gpu(gpus)
    assert words in str(error.value)
