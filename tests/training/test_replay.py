"""`dpo-fast replay`: which step it takes and from where, and what it shows of a run that ended."""

import json
import subprocess
import sys

import pytest
import yaml

pytest.importorskip("deepspeed")

from dpo_fast.errors import UserError
from dpo_fast.training.examine import Row
from dpo_fast.training.replay import find_step, replay
from tests.support.models import run_tree, write_model
from tests.support.paths import ENVIRONMENT


def dpo_fast(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "dpo_fast", *map(str, arguments)]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """A run on two ranks whose second step overflows: in row 3 all numbers are as large as may be."""
    folder = tmp_path_factory.mktemp("replay")
    write_model(folder / "model")
    with (folder / "pairs.jsonl").open("w") as stream:
        for line in range(1, 9):
            sums = (-1e18, -1.0) if line == 3 else (-40.0, -30.0)
            names = ("reference_chosen_logps", "reference_rejected_logps")
            row = {
                "prompt": f"{line}? ",
                "chosen": "yes",
                "rejected": "no",
                **dict(zip(names, sums)),
            }
            row["weight"] = 1e18 if line == 3 else 1.0
            stream.write(json.dumps(row) + "\n")
    tree = run_tree(
        folder, global_batch_size=4, micro_batch_size=2, save_steps=1, num_train_epochs=1
    )
    tree["train"]["seed"] = 0  # with which row 3 comes in the second step
    tree |= {"loss": {"type": "ipo"}, "reference": {"provider": "columns"}}
    tree |= {"parallel": {"zero_stage": 2}}
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    return folder, dpo_fast("train", folder / "run.yaml", "--nproc", 2)


@pytest.mark.processes
def test_a_replay_takes_the_same_step_on_as_many_ranks(ended):
    folder, trained = ended
    where = f"{folder / 'pairs.jsonl'}:3"
    assert trained.returncode == 2, trained.stderr
    said = " ".join(trained.stderr.split())
    fault = f"{where}: a loss that is inf, with weight 1e+18"
    assert "step 2 was not taken" in said and fault in said
    assert f'train.skip_rows=["{where}"]' in said
    replayed = dpo_fast("replay", folder / "run")
    assert replayed.returncode == 0, replayed.stderr
    assert f"from {folder / 'run' / 'checkpoint-1'}, after step 1" in replayed.stderr
    assert fault in replayed.stderr
    files = [folder / "run" / f"{name}-step-2.json" for name in ("nonfinite", "replay")]
    first, again = (json.loads(file.read_text()) for file in files)
    assert first == again and len(first["rows"]) == 4
    (line,) = (line for line in replayed.stdout.splitlines() if where in line)
    assert "inf" in line and "weight 1e+18" in line


@pytest.mark.processes
def test_a_replay_on_another_number_of_ranks_finds_the_same(ended, tmp_path):
    folder, _ = ended
    elsewhere = f"train.output_dir={tmp_path / 'replayed'}"
    replayed = dpo_fast("replay", folder / "run", elsewhere, "--nproc", 1)
    assert replayed.returncode == 0, replayed.stderr
    assert "resumed on 1 rank at ZeRO 2; the checkpoint is of 2 ranks" in replayed.stderr
    assert "anomaly detection for " in replayed.stderr  # on one rank alone
    assert "Warning" not in replayed.stderr
    told = json.loads((tmp_path / "replayed" / "replay-step-2.json").read_text())
    first = json.loads((folder / "run" / "nonfinite-step-2.json").read_text())
    rows, again = ({row["where"]: row for row in each["rows"]} for each in (first, told))
    assert rows.keys() == again.keys() and len(rows) == 4
    for where, row in rows.items():
        assert again[where]["fault"] == row["fault"]
        assert again[where]["logps"] == pytest.approx(row["logps"], rel=1e-5)


@pytest.mark.parametrize("step", ["0", "-1", "1e3", "4.5", "abc", "9" * 40])
def test_a_step_is_a_number(tmp_path, step):
    from dpo_fast.cli.replay import run_replay

    with pytest.raises(UserError, match="expected a number, counted from 1"):
        run_replay(tmp_path, step, [], None)


@pytest.mark.processes
def test_an_option_that_a_replay_would_ignore_is_refused(ended):
    folder, _ = ended
    asked = find_step(folder / "run", 2)
    for override in ("train.save_steps=2", "log.logging_steps=5", "health.stop_on=[]"):
        with pytest.raises(UserError, match="changes nothing of a replay; model, data, "):
            replay(asked, [override])
    with pytest.raises(UserError, match="sequence_parallel=2 does not divide the 1 rank"):
        replay(asked, ["parallel.sequence_parallel=2"])


def test_the_step_is_reached_from_the_last_checkpoint_before_it(tmp_path):
    (tmp_path / "config.yaml").write_text("")
    for step in (2, 4):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "state.json").write_text('{"world_size": 3}')
        (tmp_path / f"checkpoint-{step}" / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match=r"has no nonfinite-step-N.json, .* name a step"):
        find_step(tmp_path, None)
    (tmp_path / "nonfinite-step-4.json").write_text("")
    asked = find_step(tmp_path, None)
    assert (asked.step, asked.checkpoint, asked.world_size) == (4, tmp_path / "checkpoint-2", 3)
    assert find_step(tmp_path, 5).checkpoint == tmp_path / "checkpoint-4"
    assert find_step(tmp_path, 1).checkpoint is None
    assert find_step(tmp_path / "checkpoint-2", 9).checkpoint == tmp_path / "checkpoint-2"
    with pytest.raises(UserError, match="checkpoint-4 was written after step 4 began"):
        find_step(tmp_path / "checkpoint-4", 4)
    with pytest.raises(UserError, match="is no run: name its train.output_dir"):
        find_step(tmp_path / "elsewhere", 4)


NAN = float("nan")


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        ({}, None),
        (
            {"logps": [NAN, -1.0], "output": "a.b"},
            "log-probs that are nan, and the first such output",
        ),
        ({"rewards": [NAN, 1.0]}, "rewards that are nan though its log-probs are finite"),
        (
            {"loss": float("inf"), "columns": {"weight": 1e9}},
            "a loss that is inf, with weight 1e+09",
        ),
        ({"gradient": "a.weight"}, "a gradient of a.weight that is not"),
        ({"loss": NAN, "shares_loss": True}, None),
        ({"loss": NAN, "shares_loss": True, "gradient": "a.weight"}, None),
    ],
)
def test_a_row_says_what_was_not_finite_first(changed, fault):
    whole = {"columns": {}, "loss": 0.7, "logps": [-1.0, -2.0], "rewards": [0.1, 0.2]}
    row = Row("rows:1", **(whole | changed))
    assert row.fault is None if fault is None else fault in row.fault
    json.dumps(row.as_json(), allow_nan=False)
