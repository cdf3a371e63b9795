"""Whole runs that are killed, stopped, starved and interrupted: they end in time, and lose nothing.

A small sample runs always, the rest with DPO_FAST_SLOW=1 (`make faults`). The counts go to the output.
"""

import random
import signal

import pytest

pytest.importorskip("deepspeed")

from tests.support import ranks
from tests.support.faults import SLOW, FaultyRun, result
from tests.support.models import changed, run_tree, write_model, write_pairs

pytestmark = [pytest.mark.processes, pytest.mark.slow]

STEPS = 40
SECONDS = 15.0  # until the other ranks have ended; they take one or two, and CI's machines are slow


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A folder with a space and an umlaut, and the tree of a run on two ranks that has ended in it."""
    folder = tmp_path_factory.mktemp("läuft weiter")
    write_model(folder / "model")
    write_pairs(folder / "pairs.jsonl", 24)
    options = {"max_steps": STEPS, "eval_steps": 10, "save_steps": 2}
    tree = run_tree(folder, micro_batch_size=2, layout="packed", **options)
    tree["data"]["eval_rows"] = 4
    tree["parallel"] = {"zero_stage": 2}
    tree["train"]["output_dir"] = str(folder / "undisturbed")
    ranks.train([tree], 2)
    return folder, tree


def resumed_as_undisturbed(undisturbed, tree: dict) -> None:
    """Goes on with a disturbed run, which must come to what the undisturbed one came to."""
    folder, _ = undisturbed
    tree["train"]["resume_from_checkpoint"] = True
    ranks.train([tree], 2)
    root = folder / tree["train"]["output_dir"]
    assert result(root) == result(folder / "undisturbed")


def test_a_killed_rank_ends_the_other_within_seconds_and_nothing_is_lost(undisturbed):
    folder, tree = undisturbed
    tree = changed(tree, folder / "killed")
    run = FaultyRun(tree)
    run.wait_for_steps(5)
    run.hit(1, signal.SIGKILL)
    run.ends(SECONDS)
    assert run.code == 128 + signal.SIGKILL
    assert run.said().count("dpo-fast") == run.said().count("rank 1 (process ") == 1, run.said()
    resumed_as_undisturbed(undisturbed, tree)


MOMENTS = random.Random(14)
KILLS = [
    (whom, MOMENTS.randint(1, STEPS - 2), MOMENTS.random() * 0.2)
    for whom in ("all", 0, 1, "launcher") * 5
]


@SLOW
@pytest.mark.parametrize("whom, step, later", KILLS)
def test_kills_at_random_moments(undisturbed, tmp_path_factory, whom, step, later):
    """All at once, one rank or the launcher; every other step saves."""
    import time

    folder, tree = undisturbed
    tree = changed(tree, folder / f"kill-{whom}-{step}")
    run = FaultyRun(tree)
    run.wait_for_steps(step)
    time.sleep(later)
    if run.process.poll() is None:
        run.hit(whom, signal.SIGKILL)
    took = run.ends(SECONDS)
    print(
        f"kill -9 of {whom} after step {step}: all ended after {took:.1f} s, exit code {run.code}"
    )
    if whom in (0, 1) and not (folder / tree["train"]["output_dir"] / "final").exists():
        assert f"rank {whom} (process " in run.said()
    resumed_as_undisturbed(undisturbed, tree)


@SLOW
@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_rank_ends_the_others_within_the_time_out(undisturbed, stage, rank):
    folder, tree = undisturbed
    parallel = {"zero_stage": stage, "timeout_minutes": 0.1}
    run = FaultyRun(changed(tree, folder / f"stopped-{stage}-{rank}", parallel=parallel))
    run.wait_for_steps(3)
    run.hit(rank, signal.SIGSTOP)
    took = run.ends(6 + SECONDS, but=(rank,))
    print(f"SIGSTOP of rank {rank}, ZeRO {stage}: the other ended after {took:.1f} s of 6 s")
    took += run.ends(30)
    print(f"    and the launcher after {took:.1f} s")
    assert run.code == 3
    assert f"rank {rank} (process " in run.said() and "has not answered for 6 s" in run.said()
    assert "cannot be written" not in run.said() and "Traceback" not in run.said()


# Signals that ask, to whom, under which launcher. Ctrl-C in a terminal goes to all at once.
ASKED = [
    ("nproc", "launcher", "SIGTERM"), ("nproc", "launcher", "SIGHUP"), ("nproc", "launcher", "SIGUSR1"),
    ("nproc", "all", "SIGINT"), ("nproc", 1, "SIGUSR2"), ("nproc", 0, "SIGTERM"),
    ("torchrun", "launcher", "SIGTERM"), ("torchrun", "all", "SIGINT"), ("torchrun", "launcher", "SIGHUP"),
    ("torchrun", "launcher", "SIGUSR1"), ("torchrun", "launcher", "SIGKILL"),
    ("deepspeed", "launcher", "SIGTERM"), ("deepspeed", "all", "SIGINT"),
    ("deepspeed", "launcher", "SIGHUP"), ("deepspeed", "launcher", "SIGKILL"),
]  # fmt: skip


@SLOW
@pytest.mark.parametrize("launcher, whom, name", ASKED)
def test_a_signal_is_followed_by_a_checkpoint(undisturbed, launcher, whom, name):
    """Under each launcher. One that is killed, or knows the signal no better, leaves no rank behind."""
    folder, tree = undisturbed
    options = {"save_steps": 1000}
    tree = changed(tree, folder / f"asked-{launcher}-{whom}-{name}", train=tree["train"] | options)
    run = FaultyRun(tree, launcher)
    run.wait_for_steps(3)
    run.hit(whom, getattr(signal, name))
    took = run.ends(60)
    saved = list((folder / tree["train"]["output_dir"]).glob("checkpoint-*"))
    print(f"{name} to {whom} under {launcher}: ended after {took:.1f} s, {saved}, code {run.code}")
    assert saved, run.said()[-3000:]
    if launcher == "nproc":
        assert run.code == 130
    resumed_as_undisturbed(undisturbed, tree)
