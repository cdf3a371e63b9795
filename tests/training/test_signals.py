"""Signals: what asks, what ends at once, and that handlers come back."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("deepspeed")

from dpo_fast.errors import Interrupted
from dpo_fast.training import signals
from tests.support import ranks
from tests.support.models import changed, run_tree, write_model, write_pairs
from tests.support.paths import ENVIRONMENT

ALL = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")


@pytest.fixture
def later(monkeypatch):
    """Moves the clock on, so that the next Ctrl-C is another one."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def move():
        now[0] += 2.0

    return move


@pytest.fixture(autouse=True)
def handlers_come_back():
    before = {name: signal.getsignal(getattr(signal, name)) for name in ALL}
    yield
    assert {name: signal.getsignal(getattr(signal, name)) for name in ALL} == before


@pytest.mark.parametrize("name", ALL)
def test_a_signal_asks_and_more_of_it_too(name, later):
    with signals.stop_signals("") as asked:
        assert not asked()
        for _ in range(4 if name != "SIGINT" else 2):  # a scheduler may send it again
            signal.raise_signal(getattr(signal, name))
            later()
            assert asked() and asked(), "once asked, always asked"


def test_the_third_ctrl_c_ends_at_once_and_says_what_is_kept(later, capfd):
    ended = pytest.raises(Interrupted, match="by SIGINT; go on from there")
    with ended, signals.stop_signals("go on from there"):
        for _ in range(3):
            signal.raise_signal(signal.SIGINT)
            later()
        pytest.fail("not ended")
    told = capfd.readouterr().err
    assert told.count("stopping as soon as it can be saved") == 2
    assert "twice more ends it at once" in told and "once more ends it at once" in told


def test_a_nervous_ctrl_c_is_one(later):
    """Within a second: a terminal and torchrun send the same one too."""
    with signals.stop_signals("") as asked:
        for _ in range(9):
            signal.raise_signal(signal.SIGINT)
        assert asked()


def test_handlers_come_back_after_an_error_and_before_training_a_signal_ends_at_once():
    with pytest.raises(ZeroDivisionError), signals.stop_at_once(""), signals.stop_signals(""):
        raise ZeroDivisionError
    ended = pytest.raises(Interrupted, match="by SIGUSR1; nothing is lost")
    with ended, signals.stop_at_once("nothing is lost"):
        try:
            signal.raise_signal(signal.SIGUSR1)
        except Exception:  # as libraries have it
            pytest.fail("swallowed")


def test_an_end_that_python_drops_comes_again_and_the_drop_is_not_printed(monkeypatch, capsys):
    """As in a __del__ of a module that is imported."""
    monkeypatch.setattr(
        sys, "unraisablehook", sys.__unraisablehook__
    )  # pytest keeps them to itself
    monkeypatch.setattr(signals, "AGAIN_SECONDS", 0.2)
    monkeypatch.setattr(signals, "SAME_SECONDS", 0.1)

    class Drops:
        def __del__(self):
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted), signals.stop_at_once(""):
        Drops()
        for _ in range(200):
            time.sleep(0.05)
        pytest.fail("not ended")
    assert capsys.readouterr().err == "" and sys.unraisablehook is sys.__unraisablehook__


def test_other_dropped_exceptions_are_printed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)

    class Drops:
        def __del__(self):
            raise ValueError("of a library")

    with signals.stop_at_once(""):
        Drops()
    assert "ValueError: of a library" in capsys.readouterr().err


WAITS = """
import ctypes, os, signal, threading, time
from dpo_fast.training import signals

signals.AGAIN_SECONDS = 1.2
libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
with signals.stop_at_once("begin again"):
    if not (child := os.fork()):  # a worker's signals are not the run's
        while True:
            time.sleep(1)
    time.sleep(0.5)
    os.kill(child, signal.SIGTERM)
    os.waitpid(child, 0)
    threading.Timer(2.5, os.kill, [os.getpid(), signal.SIGHUP]).start()
    for _ in range(2):
        libc.pthread_mutex_lock(mutex)
"""


@pytest.mark.processes
@pytest.mark.skipif(sys.platform != "linux", reason="how large a mutex is")
def test_a_signal_ends_what_waits_in_c():
    """As torch does for ranks that have not come: Python runs no handler meanwhile."""
    command = [sys.executable, "-c", WAITS]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 130, done.stderr
    assert done.stderr.endswith("dpo-fast: interrupted by SIGHUP; begin again\n")


def test_what_is_ignored_or_taken_by_others_stays_so():
    """nohup has SIGHUP ignored; submitit has its own handler of SIGUSR2."""
    got = []
    before = (
        signal.signal(signal.SIGHUP, signal.SIG_IGN),
        signal.signal(signal.SIGUSR2, lambda number, frame: got.append(number)),
    )
    try:
        with signals.stop_at_once(""), signals.stop_signals("") as asked:
            signal.raise_signal(signal.SIGHUP)
            signal.raise_signal(signal.SIGUSR2)
            assert not asked() and got == [signal.SIGUSR2]
    finally:
        signal.signal(signal.SIGHUP, before[0])
        signal.signal(signal.SIGUSR2, before[1])


def test_batches_end_between_two_of_them():
    taken, answers = [], iter([False, False, True])
    with pytest.raises(signals.StopAsked):
        for item in signals.until(lambda: next(answers), "abc"):
            taken.append(item)
    assert taken == ["a", "b"]
    assert list(signals.until(None, "abc")) == ["a", "b", "c"]


def test_a_forked_worker_still_ends_by_sigterm():
    """A pool of `datasets` ends its workers so; one that only took note would never end."""
    with signals.stop_signals(""):
        child = os.fork()
        if not child:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM


def test_outside_the_main_thread_no_handler_is_needed():
    answers = []

    def run():
        with signals.stop_at_once(""), signals.stop_signals("") as asked:
            answers.append(asked())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert answers == [False]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A folder with a model and pairs, and the tree of a run on two ranks that has ended in it."""
    folder = tmp_path_factory.mktemp("signals")
    write_model(folder / "model")
    write_pairs(folder / "pairs.jsonl", 24)
    tree = run_tree(folder, micro_batch_size=2, layout="packed", max_steps=4, eval_steps=2)
    tree["data"]["eval_rows"] = 12
    tree["train"]["output_dir"] = str(folder / "undisturbed")
    ranks.train([tree], 2)
    return folder, tree


def result(root: Path) -> tuple:
    """What must be the same: the trained model, and every number that does not measure time."""
    lines = [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
    numbers = [{k: v for k, v in line.items() if not k.startswith("perf/")} for line in lines]
    return (root / "final" / "model.safetensors").read_bytes(), numbers


@pytest.mark.processes
@pytest.mark.parametrize("name, evaluation, batch", [("SIGTERM", 1, 1), ("SIGHUP", 2, 0)])
def test_an_evaluation_is_left_between_batches_and_taken_again(
    undisturbed, name, evaluation, batch
):
    folder, tree = undisturbed
    root = folder / f"{name}-{evaluation}"
    options = changed(tree, root)
    ranks.group(2).do("interrupted", options, name, evaluation, batch)
    assert (root / "latest").read_text() == f"checkpoint-{2 * evaluation}"
    lines = (root / "metrics.jsonl").read_text().splitlines()
    assert sum("eval_loss" in line for line in lines) == evaluation, "an evaluation was not left"
    options["train"]["resume_from_checkpoint"] = True
    ranks.train([options], 2)
    assert result(root) == result(folder / "undisturbed")


@pytest.mark.processes
def test_before_the_first_step_nothing_is_left_behind_that_stops_the_same_command(undisturbed):
    folder, tree = undisturbed
    options = changed(tree, folder / "early")
    ranks.group(1).do("interrupted", options, "SIGINT", 0, 1)
    assert not list((folder / "early").glob("checkpoint-*"))
    ranks.train([options], 1)
    assert (folder / "early" / "final").is_dir()
