"""--nproc's ranks: signals reach them, a failure of any ends all, and none outlives its launcher."""

import os
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("deepspeed")

from dpo_fast.cli import launch
from dpo_fast.training import launchers
from tests.support.paths import ENVIRONMENT

pytestmark = pytest.mark.processes


def run(script: str, *arguments: str, ranks: int = 2) -> int:
    return launch.launch_command(ranks, ["sh", "-c", script, "sh", *arguments], ENVIRONMENT)


def test_a_failure_of_the_last_rank_ends_the_first(monkeypatch):
    monkeypatch.setattr(launch, "GRACE_SECONDS", 0.2)
    begin = time.monotonic()
    assert run("test $RANK = 0 && exec sleep 60; exit 7") == 7
    assert time.monotonic() - begin < 20


def test_a_killed_rank_is_the_cause_of_the_others_codes():
    assert run("test $RANK = 1 && kill -9 $$; exit 3") == 128 + signal.SIGKILL


@pytest.mark.parametrize("name", ["INT", "TERM", "HUP", "USR1", "USR2"])
def test_signals_are_passed_on(tmp_path, name):
    """To a launcher alone, as schedulers and `kill` send them. The ranks have handlers."""
    code = (
        "import sys; from dpo_fast.cli.launch import launch_command; import os\n"
        "sys.exit(launch_command(2, ['sh', '-c', sys.argv[1], 'sh', *sys.argv[2:]], dict(os.environ)))"
    )
    script = f'trap "exit 130" {name}; touch $1/$RANK; while :; do sleep 0.05; done'
    process = subprocess.Popen(
        [sys.executable, "-c", code, script, str(tmp_path)], env=ENVIRONMENT, start_new_session=True
    )
    try:
        wait_for(lambda: len(list(tmp_path.iterdir())) == 2)
        process.send_signal(getattr(signal, f"SIG{name}"))
        assert process.wait(timeout=30) == 130
    finally:
        os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None


def wait_for(done, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("by_polling", [False, True])
def test_a_rank_whose_launcher_is_killed_gets_a_sigterm(tmp_path, monkeypatch, by_polling):
    if by_polling:
        monkeypatch.delattr(os, "pidfd_open", raising=False)
    launcher = os.fork()
    if not launcher:
        os.environ[launchers.LAUNCHER] = str(os.getpid())
        if not os.fork():
            try:
                signal.signal(signal.SIGTERM, lambda *_: (tmp_path / "asked").touch())
                launchers.watch_launchers.cache_clear()
                launchers.watch_launchers()
                (tmp_path / "up").touch()
                wait_for((tmp_path / "asked").exists, 30)
            finally:
                os._exit(0)
        time.sleep(60)
        os._exit(0)
    wait_for((tmp_path / "up").exists)
    time.sleep(0.3)
    assert not (tmp_path / "asked").exists()
    os.kill(launcher, signal.SIGKILL)
    os.waitpid(launcher, 0)
    wait_for((tmp_path / "asked").exists, 15)


def test_a_launcher_that_ended_before_it_was_watched_is_missed(monkeypatch):
    """A rank imports for seconds first."""
    if not (gone := os.fork()):
        os._exit(0)
    os.waitpid(gone, 0)
    monkeypatch.setenv(launchers.LAUNCHER, str(gone))
    assert list(launchers.launchers()) == [gone]
    assert launchers._wait_by_descriptors([gone]) == launchers._wait_by_polling([gone]) == gone


def test_a_shell_that_started_a_run_is_no_launcher(monkeypatch):
    monkeypatch.delenv(launchers.LAUNCHER, raising=False)
    monkeypatch.delenv("RANK", raising=False)
    assert list(launchers.launchers()) == []


@pytest.mark.parametrize(
    "words, expected",
    [
        (["python", "/usr/bin/torchrun", "--nproc_per_node=2", "x.py"], True),
        (["python", "-m", "torch.distributed.run", "x.py"], True),
        (["python", "-u", "-m", "deepspeed.launcher.launch", "--world_info=x"], True),
        (["bash", "-c", "torchrun train.py &"], False),  # it ends at once
        (["bash", "-c", "dpo-fast train run.yaml"], False),
        (["python", "train.py", "a", "b", "deepspeed"], False),
    ],
)
def test_launchers_are_known_by_their_command_lines(tmp_path, monkeypatch, words, expected):
    monkeypatch.setattr(launchers, "PROC", tmp_path)
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "cmdline").write_bytes("\0".join(words).encode() + b"\0")
    assert launchers._is_launcher(7) is expected
