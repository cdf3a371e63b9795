"""Ranks that notice when one of them is lost, and say which.

A thread of every rank holds a connection to rank 0. The system closes it when a process ends, however
that happens, and a stopped process or a dead machine falls silent. Rank 0 tells the others, and all end.
The backend alone would not do: nccl waits for its time-out, and gloo does not say whose connection
was closed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from dataclasses import asdict, dataclass

EXIT_LOST = 3
GRACE = 1.0  # seconds that a rank has to end by itself, with a reason of its own
LONGEST = 1 << 20  # bytes of a message
KEY = "dpo_fast/peers"
REMEDY = (
    "Checkpoints and parts of references that are done are whole: go on with "
    "train.resume_from_checkpoint=true"
)


@dataclass(frozen=True)
class Verdict:
    """Why all ranks end.

    rank, host, pid: whose fault it is.
    reason: in words.
    code: exit code for all.
    told: whether that rank has told the reason on its own standard error.
    """

    rank: int
    host: str
    pid: int
    reason: str
    code: int
    told: bool = False


@dataclass
class Link:
    """A connection to another rank. heard: when something last came, by the clock."""

    socket: socket.socket
    heard: float
    rank: int = -1
    host: str = ""
    pid: int = 0
    unread: bytes = b""
    left: bool = False  # it said that it ends


class Peers:
    """This rank's part of it. Rank 0 makes it before the others can.

    store: of the process group.
    silence: seconds without a word after which a rank counts as lost.
    """

    def __init__(self, rank: int, store, silence: float) -> None:
        self.rank, self.store, self.silence = rank, store, silence
        self.beat = min(10.0, silence / 8)  # a killed rank is known without it
        self.host, self.verdict = socket.gethostname(), None
        self._decided, self._leaving = threading.Event(), threading.Event()
        self._all_gone, self._lock = threading.Event(), threading.Lock()
        self.selector, self.links = selectors.DefaultSelector(), {}
        self.token = secrets.token_hex(16)  # of rank 0: strangers have none
        self._over, self._patience = False, math.inf
        self.listener: socket.socket | None = None
        if rank == 0:
            self._listen()
        else:
            self._connect()
        threading.Thread(target=self._run, name="dpo_fast peers", daemon=True).start()

    def fail(self, reason: str, code: int) -> None:
        """This rank ends with an error that it has told. The others end, too; rank 0 waits for them."""
        self._leaving.set()
        self._tell(asdict(Verdict(self.rank, self.host, os.getpid(), reason, code, told=True)))
        # Rank 0 holds the store, which the others ask whether their reason has been told.
        self._all_gone.wait(3.0 if self.rank == 0 else 0.2)

    def leave(self) -> None:
        """This rank has done its work, and ends."""
        self._leaving.set()
        self._tell({"bye": True})
        self._over = True

    def await_verdict(self, seconds: float) -> None:
        """After a collective has failed: does not return if a rank turns out to be lost."""
        if self._decided.wait(seconds):
            time.sleep(60)  # the thread ends the process

    def first_to_tell(self, reason: str) -> bool:
        """Whether no rank of this machine has told the reason yet."""
        try:
            digest = hashlib.sha256(f"{self.host} {reason}".encode()).hexdigest()
            return self.store.add(f"{KEY}/{digest}", 1) == 1
        except Exception:  # the store's process has ended: better told twice than never
            return True

    def _listen(self) -> None:
        self.listener = _server()
        port, pid = self.listener.getsockname()[1], os.getpid()
        hello = {"port": port, "token": self.token, "host": self.host, "pid": pid}
        self.store.set(KEY, json.dumps(hello))
        self.listener.setblocking(False)
        self.selector.register(self.listener, selectors.EVENT_READ)

    def _connect(self) -> None:
        first = json.loads(self.store.get(KEY))
        address = os.environ["MASTER_ADDR"], first["port"]
        try:
            connection = socket.create_connection(address, timeout=30)
        except OSError:
            return  # a firewall: the time-outs of the collectives are what is left
        link = Link(connection, time.monotonic(), 0, first["host"], first["pid"])
        me = {"rank": self.rank, "host": self.host, "pid": os.getpid(), "token": first["token"]}
        connection.sendall(json.dumps({"hello": me}).encode() + b"\n")
        self._add(link)

    def _add(self, link: Link) -> None:
        link.socket.setblocking(False)
        self.links[link.socket] = link
        self.selector.register(link.socket, selectors.EVENT_READ)

    def _drop(self, link: Link) -> None:
        del self.links[link.socket]
        self.selector.unregister(link.socket)
        link.socket.close()
        if not self.links:
            self._all_gone.set()

    def _run(self) -> None:
        """The thread: hear, speak, and judge."""
        spoke = looked = time.monotonic()
        while not self._over:
            for key, _ in self.selector.select(min(self.beat, 0.2)):
                if key.fileobj is self.listener:
                    with contextlib.suppress(
                        OSError
                    ):  # it has gone again, or no descriptor is left
                        self._add(Link(self.listener.accept()[0], time.monotonic()))
                else:
                    self._read(self.links[key.fileobj])
            now = time.monotonic()
            if now - looked > min(5.0, self.silence / 2):  # this process was stopped
                for link in self.links.values():
                    link.heard = now
            looked = now
            if now - spoke >= self.beat:
                spoke = now
                self._tell(None)
            for link in list(self.links.values()):
                if link.rank >= 0 and not link.left and now - link.heard > self.silence:
                    self._decide(
                        link,
                        f"has not answered for {self.silence:g} s: it is stopped, or "
                        "its machine or the network is down",
                    )
            if now > self._patience and not self._leaving.is_set():
                self._end()
        for link in list(self.links.values()):
            self._drop(link)

    def _read(self, link: Link) -> None:
        try:
            received = link.socket.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            received = b""
        link.heard = time.monotonic()
        *lines, link.unread = (link.unread + received).split(b"\n")
        for line in filter(None, lines):
            message = None
            with contextlib.suppress(ValueError):
                message = json.loads(line)
            if isinstance(message, dict):
                self._hear(link, message)
        if not received or len(link.unread) > LONGEST:
            self._drop(link)
            if link.rank >= 0 and not link.left:
                self._decide(
                    link,
                    "was lost: its process has ended without a word, as when it is "
                    "killed, for want of memory say",
                )

    def _hear(self, link: Link, message: dict) -> None:
        if "hello" in message:
            hello = message["hello"]
            if isinstance(hello, dict) and hello.get("token") == self.token:
                link.rank, link.host, link.pid = hello["rank"], hello["host"], hello["pid"]
        elif link.rank < 0:
            return  # a stranger
        elif "bye" in message:
            link.left = True
        else:
            link.left = True
            self._judge(Verdict(**message))

    def _decide(self, link: Link, what: str) -> None:
        who = f"rank {link.rank} (process {link.pid} on {link.host})"
        reason = f"{who} {what}. {REMEDY}"
        link.left = True
        self._judge(Verdict(link.rank, link.host, link.pid, reason, EXIT_LOST))

    def _judge(self, verdict: Verdict) -> None:
        if self.verdict is None:
            self.verdict, self._patience = verdict, time.monotonic() + GRACE
            if self.rank == 0 and not self._leaving.is_set():
                self._tell(asdict(verdict))
            self._decided.set()

    def _tell(self, message: dict | None) -> None:
        """To all this rank is connected with; nothing but a sign of life if there is no message."""
        line = (b"" if message is None else json.dumps(message).encode()) + b"\n"
        with self._lock:
            for link in list(self.links.values()):
                with contextlib.suppress(
                    OSError
                ):  # it is stopped or gone, which the thread will see
                    link.socket.send(line)

    def _end(self) -> None:
        """End this process, which may be in a collective that never returns."""
        verdict, local = self.verdict, int(os.environ.get("LOCAL_RANK", self.rank))
        told_here = verdict.told and verdict.host == self.host
        speaks = local == 0 or (local == 1 and verdict.rank == self.rank - 1)
        if speaks and not told_here:
            who = f"rank {verdict.rank} failed: " if verdict.told else ""
            line = f"dpo-fast (rank {self.rank}): {who}{verdict.reason}\n"
            with contextlib.suppress(OSError):
                sys.stderr.flush()
                os.write(2, line.encode())
        os._exit(verdict.code)


def _server() -> socket.socket:
    """A listening socket; of this machine alone where all ranks are on it."""
    if os.environ.get("MASTER_ADDR") in ("127.0.0.1", "localhost"):
        return socket.create_server(("127.0.0.1", 0))
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))
