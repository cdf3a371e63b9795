"""`dpo-fast reference`: on any number of ranks, interrupted and continued, used by other runs."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
import yaml

pytest.importorskip("transformers")

from dpo_fast.cli.launch import launch_command
from dpo_fast.data.batch import collate
from dpo_fast.errors import Interrupted
from dpo_fast.models import load_model, load_tokenizer
from dpo_fast.ops.linear_logp import op
from dpo_fast.references import blocks
from dpo_fast.references.artefact import read_manifest
from dpo_fast.references.providers import FrozenReference
from dpo_fast.training.config import build_config
from dpo_fast.training.fit import choose
from dpo_fast.training.load_data import load_split
from dpo_fast.training.precompute import _facts, cached_references, store_references
from dpo_fast.training.references import without_training
from tests.support.here import train as here_train
from tests.support.models import run_tree, write_model, write_pairs
from tests.support.paths import ROOT

PAIRS, EVAL, PART = 18, 4, 4  # 14 pairs to train on: 4 parts, the last with 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    write_model(folder / "model")
    write_pairs(folder / "pairs.jsonl", PAIRS)
    return folder


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(blocks, "MOST", PART)


def tree(folder: Path, output: str, **sections) -> dict:
    tree = run_tree(folder, micro_batch_size=2, layout="packed")
    tree["data"]["eval_rows"] = EVAL
    tree["train"]["output_dir"] = str(folder / output)
    for section, options in sections.items():
        tree[section] = tree.get(section, {}) | options
    return tree


class Here:
    """A run's splits and scorer in this process, without an engine."""

    def __init__(self, tree: dict) -> None:
        self.config = without_training(build_config(tree, "tree"))
        choices = choose(self.config)
        self.config = choices.applied(self.config)
        tokenizer = load_tokenizer(self.config.model)
        self.splits = [
            load_split(self.config, tokenizer, name, name == "train", trains=False)
            for name in ("train", "eval")
        ]
        self.scorer = load_model(self.config.model, attention=choices.attention.name)
        self.scored = 0

    def compute(self, fail_after: int = 10**9, failure=None):
        def scorer(**arguments):
            if self.scored == fail_after:
                failure()
            self.scored += 1
            return self.scorer(**arguments)

        scorer.eval, scorer.train = self.scorer.eval, self.scorer.train
        return store_references(
            self.config, self.config.reference.model, lambda: scorer, "cpu", self.splits
        )

    def read(self):
        def nothing_to_score():
            pytest.fail("what is stored is computed again")

        return cached_references(
            self.config, self.config.reference.model, nothing_to_score, "cpu", self.splits
        )


def rows(folder: Path, split: str = "train") -> list[dict]:
    (found,) = folder.glob(f"reference/{split}-*")
    return pyarrow.parquet.read_table(found).to_pylist()


@pytest.fixture(scope="module")
def whole(folder):
    """The rows of an uninterrupted run of one rank, with token values."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "MOST", PART)
        here = Here(tree(folder, "whole", reference={"per_token": True}))
        stored = here.compute()
    assert [len(result.split.examples) for result in stored] == [PAIRS - EVAL, EVAL]
    return rows(folder / "whole")


def test_values_are_those_that_the_policy_would_give(folder, whole):
    here = Here(tree(folder, "whole", reference={"per_token": True}))
    references = here.read()
    for split in here.splits:
        for row in range(len(split.examples)):
            batch = collate([split.examples[row]], "packed", indices=[row])
            alone = FrozenReference(here.scorer)(batch)
            reference = references[split.name]
            torch.testing.assert_close(reference(batch), alone, rtol=1e-5, atol=1e-5)
            tokens = reference.token_logps(batch).split(batch.lengths_S.tolist())
            sums = torch.stack([values.double().sum() for values in tokens]).float()
            torch.testing.assert_close(sums, reference(batch), rtol=1e-6, atol=1e-6)


def test_nothing_of_a_gradient_is_computed(folder, monkeypatch):
    plans, plan = [], op.plan_call
    monkeypatch.setattr(
        op, "plan_call", lambda *arguments: plans.append(plan(*arguments)) or plans[-1]
    )
    here = Here(tree(folder, "schedule"))
    assert any(parameter.requires_grad for parameter in here.scorer.parameters())
    here.compute()
    assert len(plans) == here.scored == 7 + 2
    assert {(each.schedule, each.gemms) for each in plans} == {("logps", 1.0)}


def test_a_failure_half_way_costs_a_part_at_most(folder, whole):
    def fail():
        raise ZeroDivisionError

    here = Here(tree(folder, "failed", reference={"per_token": True}))
    with pytest.raises(ZeroDivisionError):
        here.compute(fail_after=5, failure=fail)  # two parts of two batches, and one more
    reference = folder / "failed" / "reference"
    (begun,) = reference.iterdir()
    assert begun.name.startswith("train-") and len(read_manifest(begun)["parts"]) == 2
    here.scored = 0
    here.compute()
    assert here.scored == 3 + 2
    assert rows(folder / "failed") == whole
    assert all(result.seconds is None for result in here.compute())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_ends_it_at_once_and_keeps_the_parts(folder, whole, number):
    here = Here(tree(folder, f"stopped-{number}", reference={"per_token": True}))
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match="same command goes on after them") as stopped:
        here.compute(fail_after=4, failure=lambda: os.kill(os.getpid(), number))
    assert stopped.value.exit_code == 130
    assert here.scored == 5
    assert signal.getsignal(number) == before
    here.scored = 0
    here.compute()
    assert here.scored == 3 + 2
    assert rows(folder / f"stopped-{number}") == whole


def test_a_signal_in_the_last_batch_is_not_lost(folder):
    here = Here(tree(folder, "stopped-last"))
    with pytest.raises(Interrupted):
        here.compute(fail_after=6, failure=lambda: os.kill(os.getpid(), signal.SIGTERM))
    here.scored = 0
    here.compute()
    assert here.scored == 2  # the other split's


@pytest.mark.parametrize("dies", [False, True])
def test_three_runs_that_need_one_reference_compute_it_once(folder, whole, dies):
    """Each is a process of its own. The first to come computes; another goes on if that one dies."""
    named = folder / f"shared-{dies}"
    here = Here(tree(folder, "three", reference={"per_token": True, "cache_dir": str(named)}))
    children = []
    for number in range(3):
        if not (pid := os.fork()):
            code = 99
            try:
                if number == 0 and dies:
                    here.compute(fail_after=5, failure=lambda: os.kill(os.getpid(), signal.SIGKILL))
                here.compute()
                code = here.scored
            finally:
                os._exit(code)
        children.append(pid)
        deadline = time.monotonic() + 30
        while not (named / "train").exists():
            assert time.monotonic() < deadline
            time.sleep(0.005)
    ends = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    if dies:  # two parts of two batches were there
        assert ends[0] == -signal.SIGKILL and sum(ends[1:]) == 3 + 2
    else:
        assert sum(ends) == 7 + 2
    assert sorted(path.name for path in named.iterdir()) == ["eval", "train"]
    assert pyarrow.parquet.read_table(named / "train").to_pylist() == whole


def test_a_run_scores_what_its_steps_draw_and_a_longer_one_adds_the_rest_bit_for_bit(folder, whole):
    """A step has two pairs here and a block four, so a run of one step scores two of its seven."""
    options, known = {"per_token": True}, {row["digest"]: row for row in whole}
    here = Here(tree(folder, "short", reference=options))
    for steps, batches, count in (
        (range(1), 2 + 2, 4),  # with the other split
        (range(2), 0, 4),
        (range(6, 7), 1, 6),  # as after a checkpoint: the last block is the next that is asked for
        (range(7, 7), 0, 6),
        (range(9), 2 + 2, 14),
    ):
        here.splits[0].steps = steps
        here.scored = 0
        stored = here.compute()
        assert (here.scored, len(rows(folder / "short"))) == (batches, count), steps
        assert all(row == known[row["digest"]] for row in rows(folder / "short"))
        references = here.read()
        for step in steps:
            batch = next(here.splits[0].batches(step))
            assert references["train"](batch).isfinite().all()
    assert stored[0].computed == 8 and rows(folder / "short") != whole  # parts in another order
    assert sorted(map(str, rows(folder / "short"))) == sorted(map(str, whole))


def test_the_manifest_names_the_model_as_the_user_did(folder):
    """An adapter and the base that is named beside it are linked into a folder of this machine's cache."""
    here = Here(tree(folder, "named"))
    config, split = here.config, here.splits[0]
    assert _facts(config, split, config.model.path)["model_path"] == str(folder / "model")
    config.model._given = (
        {"path": "base", "adapter_path": "org/sft", "adapters": None},
        config.model.path,
    )
    found = _facts(config, split, config.model.path)
    assert (found["model_path"], found["adapter_path"]) == ("base", "org/sft")
    assert "adapters" not in found and _facts(config, split, "other")["model_path"] == "other"


def test_the_trainer_asks_for_no_more_than_it_draws(folder, capfd):
    """One step, then resumed with two more: as a run of three from the beginning, stored rows included."""
    options = {"lr_scheduler_type": "constant", "global_batch_size": 2, "micro_batch_size": 1}
    short = tree(folder, "one", train={**options, "max_steps": 1})
    long = tree(folder, "three", train={**options, "max_steps": 3})
    here_train(build_config(short, "one"))
    assert len(rows(folder / "one")) == 4 and len(rows(folder / "one", "eval")) == EVAL
    short["train"] |= {"max_steps": 3, "resume_from_checkpoint": True}
    here_train(build_config(short, "one"))
    here_train(build_config(long, "three"))
    assert "log-probs of 4 of 14 pairs (train), once; 4 are there already" in capfd.readouterr().err
    assert rows(folder / "one") == rows(folder / "three")
    losses = [
        [
            json.loads(line)["loss"]
            for line in (folder / name / "metrics.jsonl").open()
            if '"loss"' in line
        ]
        for name in ("one", "three")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 3


def test_batches_are_filled_where_tokens_decide(folder, whole):
    options = {"micro_batch_size": None, "tokens_per_batch": 600}
    here = Here(tree(folder, "tokens", train=options))
    here.compute()
    assert here.scored == 4 + 1  # a part in one batch
    known = {row["digest"]: row["chosen_logps"] for row in whole}
    for row in rows(folder / "tokens"):  # in another order
        assert row["chosen_logps"] == pytest.approx(known[row["digest"]], rel=1e-5)


def test_other_data_in_a_named_folder_is_refused_and_nothing_is_computed(folder):
    from dpo_fast.errors import UserError

    named = {"cache_dir": str(folder / "named")}
    Here(tree(folder, "a", reference=named)).compute()
    # The same pairs, split in another way: all of them are there.
    assert Here(tree(folder, "b", reference=named, data={"seed": 7})).read()
    data = {"train": str(write_pairs(folder / "other.jsonl", PAIRS, seed=3)), "eval_rows": EVAL}
    other = tree(folder, "c", reference=named)
    other["data"] |= data
    here = Here(other)
    with pytest.raises(UserError, match=r"14 of 14 pairs \(train\) are not in it.*other.jsonl:"):
        here.compute()
    assert here.scored == 0


def work(cases: list[dict], ranks: int) -> int:
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    command = [sys.executable, str(ROOT / "tests/support/workers/reference.py"), json.dumps(cases)]
    return launch_command(ranks, command, environment)


@pytest.fixture(scope="module")
def killed(folder, whole):
    """Two ranks with a sharded model: a whole run, one that is refused, one that a SIGKILL ends."""
    pytest.importorskip("deepspeed")
    run = folder / "run.yaml"
    run.write_text(yaml.safe_dump(tree(folder, "killed", train={"max_steps": 1})))
    (folder / "damaged" / "train").mkdir(parents=True)
    reference = ["reference", str(run)]
    two = [f"train.output_dir={folder / 'two'}", "reference.per_token=true"]
    damaged = f"reference.cache_dir={folder / 'damaged'}"
    cases = [
        {"arguments": [*reference, *two]},
        {"arguments": [*reference, damaged], "refused": "cannot be read"},
        {"arguments": reference, "kill_after": 2},
    ]
    assert work(cases, 2) == 128 + signal.SIGKILL
    return run


@pytest.mark.processes
def test_two_ranks_give_the_values_of_one(folder, whole, killed):
    assert rows(folder / "two") == whole
    (stored,) = (folder / "two").glob("reference/train-*")
    assert [each["world_size"] for each in read_manifest(stored)["computed"]] == [2]


@pytest.mark.processes
def test_what_two_killed_ranks_began_one_completes_and_two_runs_use(folder, whole, killed, capfd):
    reference = folder / "killed" / "reference"
    (begun,) = reference.iterdir()
    assert len(read_manifest(begun)["parts"]) == 2
    other = tree(folder, "user", train={"max_steps": 1}, reference={"cache_dir": str(reference)})
    (folder / "user.yaml").write_text(yaml.safe_dump(other))
    cases = [
        {"arguments": ["reference", str(killed)]},
        {"arguments": ["reference", str(killed)], "scoring": False},
        {"arguments": ["train", str(killed)], "scoring": False},
        {"arguments": ["train", str(folder / "user.yaml")], "scoring": False},
    ]
    assert work(cases, 1) == 0
    told, progress = capfd.readouterr()
    assert "log-probs of 6 of 14 pairs (train), once; 8 are there already" in progress
    assert "train: 14 pairs, 6 of them computed at" in told and "eval: 4 pairs, computed at" in told
    assert "train: 14 pairs, was there already" in told
    (stored,) = reference.glob("train-*")
    assert [each["world_size"] for each in read_manifest(stored)["computed"]] == [2, 1]
    assert f'pandas.read_parquet("{stored}")' in told
    values = rows(folder / "killed")
    assert values == [{name: row[name] for name in values[0]} for row in whole]
    for name in ("killed", "user"):
        first = json.loads((folder / name / "metrics.jsonl").read_text().splitlines()[0])
        assert first["eval_loss"] == pytest.approx(0.6931472, abs=1e-6)
    assert not (folder / "user" / "reference").exists()
