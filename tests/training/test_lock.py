"""One run at a time in a folder: told apart at once, and nothing left of a run that was killed."""

import fcntl
import os
import re
import signal
import socket
import threading
import time

import pytest

pytest.importorskip("deepspeed")

from dpo_fast.errors import UserError
from dpo_fast.training import lock
from dpo_fast.training.places import check_writable


def holding(root, act=lambda: None) -> int:
    """A process that holds the lock until it is killed."""
    pid = os.fork()
    if not pid:
        try:
            with lock.sole_run(str(root)):
                act()
                (root / "held").touch()
                time.sleep(60)
        finally:
            os._exit(1)
    deadline = time.monotonic() + 20
    while not (root / "held").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return pid


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


@pytest.fixture(autouse=True)
def a_short_moment(monkeypatch):
    monkeypatch.setattr(lock, "MOMENT", 0.3)


def test_a_run_that_is_just_being_cleared_away_is_waited_for(tmp_path, monkeypatch):
    """A killed process has its locks until the system has freed its memory."""
    monkeypatch.setattr(lock, "MOMENT", 20.0)
    pid = holding(tmp_path)
    threading.Timer(0.5, kill, [pid]).start()
    lock.check_free(str(tmp_path))
    with lock.sole_run(str(tmp_path)):
        pass


def test_a_folder_is_one_folder_under_all_its_names(tmp_path, monkeypatch):
    root, parent = tmp_path / "real" / "run", tmp_path / "link"
    root.mkdir(parents=True)
    parent.symlink_to(tmp_path / "real")
    (tmp_path / "direct").symlink_to(root)
    pid = holding(parent / "run")
    monkeypatch.chdir(tmp_path)
    try:
        for name in (root, tmp_path / "direct", "link/run", "link/../real/run"):
            with pytest.raises(UserError, match=f"process {pid} on "), lock.sole_run(str(name)):
                pytest.fail("two runs")
            with pytest.raises(UserError, match=f"process {pid} on "):
                lock.check_free(str(name))
    finally:
        kill(pid)


def test_the_second_run_is_told_who_has_the_folder_and_a_killed_one_leaves_no_lock(tmp_path):
    root = tmp_path / "a b" / "ü"
    pid = holding(root)
    who = rf"process {pid} on {re.escape(socket.gethostname())}, since 20"
    text = rf"{root} is in use by another run \({who}"
    try:
        for _ in range(2):  # the second time, too
            with pytest.raises(UserError, match=text), lock.sole_run(str(root)):
                pytest.fail("two runs")
        with pytest.raises(UserError, match=text):
            lock.check_free(str(root))
    finally:
        kill(pid)
    assert (root / lock.NAME).exists()
    lock.check_free(str(root))
    with lock.sole_run(str(root)):
        assert f'"pid": {os.getpid()}' in (root / lock.NAME).read_text()
    assert not (root / lock.NAME).exists()


def test_a_forked_worker_that_survives_does_not_keep_the_lock(tmp_path):
    """A pool that tokenises may outlive a killed run by a moment, or for ever."""
    worker = []

    def fork():
        if not (child := os.fork()):
            time.sleep(60)
            os._exit(0)
        (tmp_path / "worker").write_text(str(child))

    root = tmp_path / "run"
    kill(holding(root, fork))
    worker.append(int((tmp_path / "worker").read_text()))
    try:
        os.kill(worker[0], 0)
        with lock.sole_run(str(root)):
            pass
    finally:
        os.kill(worker[0], signal.SIGKILL)


def test_a_run_that_wrote_nothing_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), lock.sole_run(str(tmp_path / "new")):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
    (tmp_path / "mine").mkdir()
    with lock.sole_run(str(tmp_path / "mine")):
        pass
    assert (tmp_path / "mine").is_dir()


def test_a_lock_on_a_removed_file_does_not_count(tmp_path, monkeypatch):
    """The run before ends between our opening of its file and our locking it."""
    (tmp_path / lock.NAME).touch()
    lockf, removed = fcntl.lockf, []

    def late(descriptor, how):
        if not removed:
            removed.append((tmp_path / lock.NAME).unlink())
        return lockf(descriptor, how)

    monkeypatch.setattr(fcntl, "lockf", late)
    with lock.sole_run(str(tmp_path)):
        assert (tmp_path / lock.NAME).exists()


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, capfd):
    def none(descriptor, how):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", none)
    with lock.sole_run(str(tmp_path / "run")):
        pass
    assert "on a file system without locks (No locks available)" in capfd.readouterr().err


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").touch()
    refused = pytest.raises(UserError, match="cannot be written: Not a directory; name another")
    with refused, lock.sole_run(str(tmp_path / "file" / "run")):
        pass


@pytest.mark.parametrize("below", ["", "run"])
def test_a_link_to_a_folder_that_is_gone_is_told(tmp_path, below):
    """As of a scratch disk that was cleaned."""
    (tmp_path / "runs").symlink_to(tmp_path / "scratch")
    with pytest.raises(UserError, match="runs is a link to .*scratch, which is not there"):
        check_writable(str(tmp_path / "runs" / below))
    (tmp_path / "scratch").mkdir()
    check_writable(str(tmp_path / "runs" / below))
