"""Whole runs that are killed, stopped, starved and interrupted: they end in time, and lose nothing.

A small sample runs always, the rest with DPO_FAST_SLOW=1 (`make faults`). The counts go to the output.
"""

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("deepspeed")

from tests.support import ranks
from tests.support.faults import SLOW, FaultyRun, result
from tests.support.models import changed, run_tree, write_model, write_pairs
from tests.support.paths import ENVIRONMENT

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
    run.ranks_end(SECONDS)
    run.ends(SECONDS)
    assert run.code == 128 + signal.SIGKILL
    ended = [line for line in run.said().splitlines() if line.startswith("dpo-fast")]
    assert len(ended) == 1 and "rank 1 (process " in ended[0], run.said()
    resumed_as_undisturbed(undisturbed, tree)


MOMENTS = random.Random(14)
KILLS = [
    (number, whom, MOMENTS.randint(1, STEPS - 2), MOMENTS.random() * 0.2)
    for number, whom in enumerate(("all", 0, 1, "launcher") * 5)
]


@SLOW
@pytest.mark.parametrize("number, whom, step, later", KILLS)
def test_kills_at_random_moments(undisturbed, number, whom, step, later):
    """All at once, one rank or the launcher; every other step saves."""
    folder, tree = undisturbed
    tree = changed(tree, folder / f"kill-{number}")
    run = FaultyRun(tree)
    run.wait_for_steps(step)
    time.sleep(later)
    if run.process.poll() is None:
        run.hit(whom, signal.SIGKILL)
    took = run.ranks_end(SECONDS)
    run.ends(SECONDS)
    print(f"kill -9 of {whom} after step {step}: ranks ended after {took:.1f} s, code {run.code}")
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
    took = run.ranks_end(6 + SECONDS, but=rank)
    print(f"SIGSTOP of rank {rank}, ZeRO {stage}: the other ended after {took:.1f} s of 6 s")
    run.ends(30)
    assert run.code == 3
    assert f"rank {rank} (process " in run.said() and "has not answered for 6 s" in run.said()
    assert "cannot be written" not in run.said() and "Traceback" not in run.said()


PAUSE = """
import os, sys, threading, time
def hold():  # the export stands still before it writes
    while True:
        export = sys.modules.get("dpo_fast.training.export")
        if hasattr(export, "write_export"):
            write = export.write_export
            def held(*arguments, **options):
                os.write(2, b"PAUSE export\\n")
                [time.sleep(0.1) for _ in range(200)]
                return write(*arguments, **options)
            export.write_export = held
            return
        time.sleep(0.005)
if "RANK" in os.environ:
    threading.Thread(target=hold, daemon=True).start()
"""
# What a run says when it begins with something that takes a while.
PHASES = {
    "reference": "computing the reference log-probs of 2000",
    "evaluation": "step 0: loss",
    "export": "PAUSE export",
}


@SLOW
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize(
    "whom, name", [(1, "SIGKILL"), (0, "SIGTERM"), ("launcher", "SIGKILL"), ("all", "SIGINT")]
)
def test_what_happens_while_no_step_is_taken(undisturbed, tmp_path, phase, whom, name):
    """Signals and lost ranks while the reference is stored, while it evaluates, and while it exports."""
    folder, tree = undisturbed
    root, environment = folder / f"{phase}-{whom}-{name}", {}
    if phase == "export":
        (tmp_path / "sitecustomize.py").write_text(PAUSE)
        environment = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ENVIRONMENT['PYTHONPATH']}"}
        tree = changed(tree, root)
    else:
        many = {"eval": str(write_pairs(tmp_path / "many.jsonl", 2000)), "eval_rows": 0}
        tree = changed(tree, root, data=many, train={"max_steps": 4, "eval_steps": 4})
    run = FaultyRun(tree, **environment)
    run.wait_until_said(PHASES[phase])
    time.sleep(0.3)
    run.hit(whom, getattr(signal, name))
    took = run.ranks_end(SECONDS)
    run.ends(SECONDS)
    assert "Traceback" not in run.said() and not (root / "final").exists(), run.said()[-3000:]
    print(f"{name} to {whom} in the {phase}: ended after {took:.1f} s, code {run.code}")
    if phase == "export":
        resumed_as_undisturbed(undisturbed, tree)
        return
    tree["train"]["resume_from_checkpoint"] = True
    ranks.train([tree], 2)
    assert (root / "final" / "model.safetensors").exists()


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
    took = run.ranks_end(60)
    run.ends(60)
    saved = list((folder / tree["train"]["output_dir"]).glob("checkpoint-*"))
    print(f"{name} to {whom} under {launcher}: ended after {took:.1f} s, {saved}, code {run.code}")
    assert saved, run.said()[-3000:]
    if launcher == "nproc":
        assert run.code == 130
    resumed_as_undisturbed(undisturbed, tree)


@SLOW
@pytest.mark.parametrize("delay", [3, 5, 7, 9, 11, 14, 17])
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_signals_while_a_run_begins(undisturbed, delay, name):
    """Imports, tokenising in processes, loading, the reference: no process stays, and it can go on."""
    folder, tree = undisturbed
    cache = {
        "data": tree["data"] | {"workers": 2, "cache_dir": str(folder / f"early-{delay}-{name}")}
    }
    tree = changed(tree, folder / f"begins-{delay}-{name}", **cache)
    run = FaultyRun(tree)
    with contextlib.suppress(subprocess.TimeoutExpired):
        run.process.wait(delay)
        pytest.skip(f"the run is over after {delay} s")
    run.hit("all" if name == "SIGINT" else "launcher", getattr(signal, name))
    took = run.ranks_end(60)
    run.ends(60)
    print(f"{name} after {delay} s: ended after {took:.1f} s, code {run.code}, step {run.steps()}")
    # Until a command has imported what it needs, a signal ends it as it ends any program.
    assert run.code in (130, 143, -signal.SIGTERM, 1, 0), run.said()[-3000:]
    if run.code == 130:
        # A short-lived process of a library may be ending by itself when the signal comes to all.
        ending = r"Exception ignored in: <module 'threading'.*?KeyboardInterrupt: ?\n"
        said = re.sub(ending, "", run.said(), flags=re.S)
        assert "Traceback" not in said, said[-3000:]
    resumed_as_undisturbed(undisturbed, tree)


# A starved machine. One rank; a run that cannot write ends with a message, and goes on when it can.


def alone(undisturbed, name: str, prefix=(), sections=None, **environment: str) -> FaultyRun:
    folder, tree = undisturbed
    tree = changed(tree, folder / name, **(sections or {}))
    return FaultyRun(tree, "alone", prefix, **environment)


def ended_well(run: FaultyRun) -> None:
    assert run.code == 0, run.said()[-3000:]
    assert (run.root / "final" / "model.safetensors").exists()


def told(run: FaultyRun, *words: str) -> None:
    """It ended with a message of one paragraph that has these words."""
    assert run.code == 2, (run.code, run.said()[-3000:])
    assert "Traceback" not in run.said(), run.said()[-3000:]
    for word in words:
        assert word in run.said(), run.said()[-3000:]


def limited(what: str, value: int) -> list[str]:
    """A command before the command that sets a limit of the system."""
    code = (
        "import os, resource, sys; what = getattr(resource, sys.argv[1]); value = int(sys.argv[2]);"
        "resource.setrlimit(what, (value, value)); os.execvp(sys.argv[3], sys.argv[3:])"
    )
    return [sys.executable, "-c", code, what, str(value)]


MOUNTS = pytest.mark.skipif(
    subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode != 0
    if shutil.which("unshare")
    else True,
    reason="only root may mount",
)


@SLOW
@pytest.mark.parametrize("stream", ["/dev/full", "closed pipe", "closed"])
def test_a_log_that_cannot_be_written_ends_no_run(undisturbed, stream):
    """Standard output and error: a full disk, a pager that was left, descriptors that are closed."""
    name = stream.strip("/").replace("/", "-")
    redirected = {
        "/dev/full": '"$@" >/dev/full 2>/dev/full',
        "closed pipe": '"$@" 2>&1 | true; exit 0',
        "closed": '"$@" >&- 2>&-',
    }[stream]
    run = alone(undisturbed, name, ["sh", "-c", redirected, "sh"])
    run.ends(120)
    ended_well(run)


@SLOW
@pytest.mark.parametrize(
    "variables", [{"LC_ALL": "C", "LANG": "C"}, {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0"}]
)
def test_no_locale_and_a_folder_with_a_space_and_umlauts(undisturbed, variables):
    run = alone(undisturbed, f"größe {variables['LC_ALL']}", **variables)
    run.ends(120)
    ended_well(run)


@SLOW
def test_few_descriptors(undisturbed):
    run = alone(undisturbed, "few", limited("RLIMIT_NOFILE", 64))
    run.ends(120)
    ended_well(run)


@SLOW
@MOUNTS
@pytest.mark.parametrize("processes", [1, 2])
def test_no_shared_memory(undisturbed, processes):
    folder, tree = undisturbed
    cache = str(folder / f"cache-{processes}")
    sections = {"data": tree["data"] | {"workers": processes, "cache_dir": cache}}
    prefix = [
        "unshare",
        "--mount",
        "sh",
        "-c",
        'mount --bind /proc/self/fdinfo /dev/shm && "$@"',
        "sh",
    ]
    run = alone(undisturbed, f"shm-{processes}", prefix, sections)
    run.ends(120)
    if processes == 1:
        ended_well(run)
    else:
        told(run, "data.workers=2 needs shared memory (/dev/shm)", "data.workers=1")


@SLOW
@MOUNTS
@pytest.mark.parametrize("kib", [4, 16, 32, 40, 200, 400, 900, 1500])
def test_a_full_disk_is_told_and_nothing_is_lost(undisturbed, kib):
    """A small disk under the run's folder: storing the reference, logging, saving or exporting fills it."""
    folder, tree = undisturbed
    small = folder / f"disk-{kib}"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", small], check=True)
    try:
        tree = changed(tree, small / "run")
        run = FaultyRun(tree, file=folder / f"disk-{kib}.yaml")
        run.ends(120)
        print(f"a disk of {kib} KiB: {run.said().strip().splitlines()[-1][:200]}")
        if run.code != 0:
            told(run, "cannot be written")
        subprocess.run(["mount", "-o", "remount,size=64m", small], check=True)
        tree["train"]["resume_from_checkpoint"] = True
        ranks.train([tree], 2)
        assert result(small / "run") == result(folder / "undisturbed")
    finally:
        subprocess.run(["umount", "-l", small], check=True)


@SLOW
@MOUNTS
@pytest.mark.parametrize("what", ["output", "cache", "reference"])
def test_a_folder_that_is_read_only_is_told(undisturbed, what):
    """For root too: mounted so."""
    folder, tree = undisturbed
    place = folder / f"read-only-{what}"
    place.mkdir()
    sections = {
        "output": {},
        "cache": {"data": tree["data"] | {"cache_dir": str(place)}},
        "reference": {"reference": {"cache_dir": str(place / "stored")}},
    }[what]
    tree = changed(tree, folder / f"of-{what}", **sections)
    if what == "output":
        tree["train"]["output_dir"] = str(place / "run")
    mount = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"'
    prefix = ["unshare", "--mount", "sh", "-c", mount, str(place)]
    run = FaultyRun(tree, "alone", prefix, file=folder / f"of-{what}.yaml")
    run.ends(120)
    told(run, "Read-only file system", str(place))
