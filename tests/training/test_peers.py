"""Ranks that notice when one is lost: processes that are forked off, without a backend."""

import json
import os
import signal
import socket
import time
from pathlib import Path

import pytest

pytest.importorskip("deepspeed")

from torch.distributed import FileStore

from dpo_fast.errors import LostPeer
from dpo_fast.training.distributed import collective_errors
from dpo_fast.training.peers import EXIT_LOST, KEY, Peers

RANKS, UNTOLD = 3, 99


class Group:
    """Forked ranks that do nothing but watch each other. act: what each does first."""

    def __init__(self, folder: Path, silence: float, act) -> None:
        self.folder, self.pids, self.codes = folder, [], {}
        for rank in range(RANKS):
            pid = os.fork()
            if not pid:
                self._be(rank, silence, act)
            self.pids.append(pid)
        self._wait(lambda: len(list(folder.glob("ready-*"))) == RANKS, 20)
        time.sleep(0.2)  # the last greeting is on its way

    def _be(self, rank: int, silence: float, act) -> None:
        os.dup2(os.open(self.folder / "said", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "LOCAL_RANK": str(rank)}
        try:
            peers = Peers(rank, FileStore(str(self.folder / "store"), RANKS), silence)
            (self.folder / f"ready-{rank}").touch()
            time.sleep(0.5)
            act(rank, peers)
            time.sleep(60)
        finally:
            os._exit(UNTOLD)

    def ends(self, *ranks: int, within: float) -> list[int]:
        """The exit codes of these ranks, which end within so many seconds."""
        self._wait(lambda: all(self._ended(rank) for rank in ranks), within)
        return [self.codes[rank] for rank in ranks]

    def said(self) -> list[str]:
        return (self.folder / "said").read_text().splitlines()

    def _ended(self, rank: int) -> bool:
        if rank not in self.codes:
            pid, status = os.waitpid(self.pids[rank], os.WNOHANG)
            if pid:
                self.codes[rank] = os.waitstatus_to_exitcode(status)
        return rank in self.codes

    def _wait(self, done, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < deadline, f"{self.codes} ended; {self.said()}"
            time.sleep(0.01)

    def end(self) -> None:
        for rank, pid in enumerate(self.pids):
            if not self._ended(rank):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


@pytest.fixture
def group(tmp_path):
    made = []

    def make(silence: float = 60.0, act=lambda rank, peers: None) -> Group:
        made.append(Group(tmp_path, silence, act))
        return made[0]

    yield make
    for each in made:
        each.end()


@pytest.mark.parametrize("lost", range(RANKS))
def test_a_killed_rank_is_named_once_and_the_others_end(group, lost):
    ranks = group()
    os.kill(ranks.pids[lost], signal.SIGKILL)
    others = [rank for rank in range(RANKS) if rank != lost]
    assert ranks.ends(*others, within=10) == [EXIT_LOST] * 2
    (line,) = ranks.said()
    assert f"rank {lost} (process {ranks.pids[lost]} on {socket.gethostname()}) was lost" in line
    assert "train.resume_from_checkpoint=true" in line


@pytest.mark.parametrize("stopped", [0, 2])
def test_a_stopped_rank_is_named_after_the_time_out(group, stopped):
    ranks = group(silence=1.0)
    os.kill(ranks.pids[stopped], signal.SIGSTOP)
    others = [rank for rank in range(RANKS) if rank != stopped]
    assert ranks.ends(*others, within=12) == [EXIT_LOST] * 2
    (line,) = ranks.said()
    assert f"rank {stopped} (process {ranks.pids[stopped]}" in line and "for 1 s" in line


def test_all_ranks_stopped_for_a_while_go_on(group):
    """As by Ctrl-Z, or a scheduler that suspends a job."""
    ranks = group(silence=1.0)
    for number, pause in ((signal.SIGSTOP, 2.5), (signal.SIGCONT, 2.0)):
        for pid in ranks.pids:
            os.kill(pid, number)
        time.sleep(pause)
    assert not any(ranks._ended(rank) for rank in range(RANKS)), ranks.said()


def test_a_reason_is_told_once_on_a_machine_and_all_have_its_exit_code(group):
    def act(rank: int, peers: Peers) -> None:
        if rank == 1 and peers.first_to_tell("no such column"):
            os.write(2, b"no such column\n")
        if rank == 1:
            peers.fail("no such column", 2)
            os._exit(2)

    ranks = group(act=act)
    assert ranks.ends(0, 1, 2, within=10) == [2, 2, 2]
    assert ranks.said() == ["no such column"]


def test_ranks_that_all_fail_tell_it_once_and_end_by_themselves(group):
    def act(rank: int, peers: Peers) -> None:
        if peers.first_to_tell("the same"):
            os.write(2, b"the same\n")
        peers.fail("the same", 2)
        os._exit(10 + rank)

    ranks = group(act=act)
    assert ranks.ends(0, 1, 2, within=10) == [10, 11, 12]
    assert ranks.said() == ["the same"]


def test_ranks_of_other_machines_are_told_the_reason(group):
    def act(rank: int, peers: Peers) -> None:
        peers.host = f"node-{rank}"
        if rank == 2:
            peers.fail("out of memory", 1)
            os._exit(1)

    ranks = group(act=act)
    assert ranks.ends(0, 1, 2, within=10) == [1, 1, 1]
    assert ranks.said() == ["dpo-fast (rank 0): rank 2 failed: out of memory"]


def test_a_rank_that_has_done_its_work_is_not_missed(group):
    def act(rank: int, peers: Peers) -> None:
        if rank == 1:
            peers.leave()
            os._exit(0)

    ranks = group(silence=1.0, act=act)
    assert ranks.ends(1, within=5) == [0]
    time.sleep(2.0)
    assert not ranks._ended(0) and not ranks._ended(2), ranks.said()


def test_strangers_change_nothing(group):
    """A port scanner, or a process of another run."""
    ranks = group()
    port = json.loads(FileStore(str(ranks.folder / "store"), RANKS).get(KEY))["port"]
    verdict = {"rank": 1, "host": "x", "pid": 1, "reason": "x", "code": 2, "told": False}
    hello = {"hello": {"rank": 1, "host": "x", "pid": 1, "token": "x" * 32}}
    for lines in (
        json.dumps(hello).encode() + b"\n",
        b"GET / HTTP/1.1\r\n\r\n",
        json.dumps(verdict).encode() + b"\n",
        b"\xff\n",
        b"[]\n",
    ):
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(lines)
    time.sleep(1.5)
    assert not any(ranks._ended(rank) for rank in range(RANKS)), ranks.said()
    os.kill(ranks.pids[2], signal.SIGKILL)
    assert ranks.ends(0, 1, within=10) == [EXIT_LOST] * 2


def test_the_error_of_a_collective_is_none_of_the_disk():
    for text in (
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer [::1]:7",
        "[/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:82] Timed out waiting 9ms",
        "NCCL communicator was aborted on rank 3",
    ):
        with pytest.raises(LostPeer, match="another rank is gone"), collective_errors():
            raise RuntimeError(text)
    for other in (RuntimeError("unexpected pos 64 vs 0"), OSError(28, "No space left on device")):
        with pytest.raises(type(other)), collective_errors():
            raise other
