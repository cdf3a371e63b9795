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
        "dash_ed": 1e-6,
        "text": "two words",
        "json": {"x": 1},
        "negative": -1,
    }


def test_variables_of_the_script_are_written_out(monkeypatch):
    text = 'BASE=/data\nexport MODEL="${BASE}/m"\ntrl dpo --model $MODEL --other ${BASE}\n'
    assert command(text).options == {"model": "/data/m", "other": "/data"}
    monkeypatch.setenv("OF_THE_ENVIRONMENT", "e")
    assert command("trl dpo --x $OF_THE_ENVIRONMENT").options == {"x": "e"}


SCRIPTS = {  # a script: the options of its command
    "A=1 # a note\ntrl dpo --x $A": {"x": 1},
    "export A=1 B='$A'\ntrl dpo --x $A --y \"$B\"": {"x": 1},
    "A=${NOT_SET:-2}\ntrl dpo --x ${A} --y ${NOT_SET:-3} --z '${NOT_SET:-}'": {
        "x": 2,
        "y": 3,
        "z": None,
    },
    "A=4\nB=$((A * 8)); C=$((B/2))\ntrl dpo --x $B --y $C": {"x": 32, "y": 16},
    'A=(\n  --x 1  # a note\n  --y "two words"\n)\nA+=(--z)\ntrl dpo "${A[@]}" --w': {
        "x": 1,
        "y": "two words",
        "z": True,
        "w": True,
    },
    'A="--x 1 \\\n  --y 2"\ntrl dpo $A': {"x": 1, "y": 2},
    "A=1\ntrl dpo --x $A\nA=2": {"x": 1},
    "trl dpo \\\r\n  --x 1 \\\r\n  --y 2\r\necho done\r\n": {"x": 1, "y": 2},
    "trl dpo `\n  --x 1 `\n  --y 2\n": {"x": 1, "y": 2},
    "trl dpo ^\r\n  --x 1\r\n": {"x": 1},
    "if true; then\n  trl dpo --x 1\nfi\n": {"x": 1},
    'CMD="trl dpo --x 1"\neval $CMD': {"x": 1},
    'L="torchrun --nproc_per_node 2"\nC="trl dpo --x 1 --y $L"\nsrun bash -c "env $C" 2>&1': {
        "x": 1,
        "y": "torchrun",
        "nproc_per_node": 2,
    },
    "for a in 1; do\n  CUDA_VISIBLE_DEVICES=0 trl dpo --x 1\ndone": {"x": 1},
    'D=$(cd "$(dirname "$0")" && pwd)\ntrl dpo --x 1 --y $D/z': {"x": 1},
}


@pytest.mark.parametrize("text", SCRIPTS)
def test_scripts_as_people_write_them(text):
    assert command(text).options == SCRIPTS[text]


def test_what_nothing_sets_is_noted_and_the_rest_is_read():
    assert command("trl dpo --x $(basename a/b)-c").unread["x"].endswith("write its value")
    assert "$(basename a/b)" in command("trl dpo --x '$(basename a/b)-c'").unread["x"]
    found = command('trl dpo --x $1 --y 2 $EXTRA_OF_NOBODY "$@" --z a/$NOBODY_SETS/b --w "`date`"')
    assert found.options == {"y": 2}
    assert set(found.unread) == {"x", "$EXTRA_OF_NOBODY", "$@", "z", "w"}
    assert found.unread["x"].startswith("is $1, which neither the script nor the environment sets")
    assert "with $NOBODY_SETS" in found.unread["z"]


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
    "N=2\nG=$((N * 4))\naccelerate launch --config_file a.yaml --num_processes ${G} train_dpo": 8,
    "torchrun --nproc_per_node $NOBODY_SETS train_dpo": None,
}


@pytest.mark.parametrize("text", RANKS)
def test_ranks_are_what_the_launcher_says(text):
    found = command(text)
    assert found.ranks == RANKS[text]
    assert found.accelerate == ("a.yaml" if "accelerate" in text else None)


def test_a_command_ends_where_the_shell_ends_it():
    assert command("train_dpo --x 1 && rm -r y").options == {"x": 1}
    for end in (
        "2>&1 | tee log",
        "&> $LOG",
        ">log 2>&1",
        "2> log",
        "; ls",
        "|& tee log",
        "< rows",
        "&",
    ):
        assert command(f"train_dpo --x 1 {end}").options == {"x": 1}, end
    assert command("train_dpo --x 1; ls --y 2").options == {"x": 1}
    assert command("# trl dpo --x 2\ntrl dpo --x 3").options == {"x": 3}


def test_what_is_no_command_of_the_trainer():
    assert not is_command("model: a\n", MARKS) and is_command("trl dpo\n", MARKS)
    with pytest.raises(UserError, match="run.sh: no line starts the trainer"):
        command("echo hello")
    with pytest.raises(UserError, match="run.sh: the command of line 3 breaks off"):
        command("A=1\n\ntrl dpo --x 'a")


def test_each_command_of_a_script_is_found_with_its_line():
    text = "A=1\ntrl sft --x $A \\\n  --y 2\n# trl kto\necho trl orpo\nA=3\ntrl dpo --x $A"
    found = read_commands(text, MARKS, "run.sh")
    assert [(each.line, each.words, each.options["x"]) for each in found] == [
        (2, ["sft"], 1),
        (7, ["dpo"], 3),
    ]
