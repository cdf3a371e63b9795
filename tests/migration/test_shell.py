"""Command lines in scripts, as people write them."""

import pytest

from dpo_fast.errors import UserError
from dpo_fast.migration.shell import is_command, read_commands

MARKS = (r"\btrl (?=\w+)", r"\btrain_dpo\b")


def command(text):
    return read_commands(text, MARKS, "run.sh")[0]


def test_flags_in_every_form():
    found = command(
        "trl dpo --a 1 --b=x --flag --no_flag2 --list p q --dash-ed 1e-6 \\\n  --text 'two words' "
        "--json '{\"x\": 1}' --negative -1 # --not this\n"
    )
    assert found.words == ["dpo"]
    assert found.options == {
        "a": 1,
        "b": "x",
        "flag": True,
        "flag2": False,
        "list": ["p", "q"],
        "dash_ed": "1e-6",
        "text": "two words",
        "json": {"x": 1},
        "negative": -1,
    }


def test_variables_of_the_script_are_written_out():
    text = 'BASE=/data\nexport MODEL="${BASE}/m"\ntrl dpo --model $MODEL --other ${BASE}\n'
    assert command(text).options == {"model": "/data/m", "other": "/data"}
    with pytest.raises(UserError, match=r"run.sh: --x '\$2' holds|run.sh: --x '\$HOME' holds"):
        command("trl dpo --x $HOME")


RANKS = {
    "torchrun --nproc_per_node 4 train_dpo --x 1": 4,
    "torchrun --nproc-per-node=2 train_dpo --x 1": 2,
    "accelerate launch --config_file a.yaml --num_processes 8 train_dpo --x 1": 8,
    "deepspeed --num_gpus=2 train_dpo --x 1": 2,
    "deepspeed --include localhost:1,3,5 train_dpo": 3,
    "CUDA_VISIBLE_DEVICES=0,1 train_dpo": 2,
    "train_dpo --x 1": None,
    "torchrun --nnodes 2 --nproc_per_node=8 train_dpo": 16,
    "N=4\ntorchrun --nnodes=$N --nproc-per-node 8 train_dpo": 32,
    "torchrun --nnodes=1:4 --nproc-per-node 8 train_dpo": 8,
    "deepspeed --num_nodes 2 --num_gpus 4 train_dpo": 8,
    "accelerate launch --config_file a.yaml --num_machines 2 --num_processes 16 train_dpo": 16,
    "NNODES=2 NPROC_PER_NODE=4 train_dpo": 8,
}


@pytest.mark.parametrize("text", RANKS)
def test_ranks_are_what_the_launcher_says(text):
    found = command(text)
    assert found.ranks == RANKS[text]
    assert found.accelerate == ("a.yaml" if "accelerate" in text else None)


def test_a_command_ends_where_the_shell_ends_it():
    assert command("train_dpo --x 1 && rm -r y").options == {"x": 1}
    assert command("train_dpo --x 1 2>&1 | tee log").options == {"x": 1}
    assert command("# trl dpo --x 2\ntrl dpo --x 3").options == {"x": 3}


def test_what_is_no_command_of_the_trainer():
    assert not is_command("model: a\n", MARKS) and is_command("trl dpo\n", MARKS)
    with pytest.raises(UserError, match="run.sh: no line starts the trainer"):
        command("echo hello")
    with pytest.raises(UserError, match="run.sh: the command breaks off"):
        command("trl dpo --x 'a")
