"""Processes that measure for another one: a crash or a hang costs only what they were at.

A worker takes lines of text and answers by lines of JSON. One that dies, or that says nothing for too long,
is killed with all that it started. The next line starts another one.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from benchmarks.machine import ROOT

TAIL = 1500  # characters of a dead process's last words
FATAL = ("CUDA error", "device-side assert", "illegal")


class Lost(RuntimeError):
    """The process is gone; the text says how, in a line.

    words: the last that it printed.
    late: it was killed because it said nothing for too long.
    by: name of the signal that it died of, if one killed it.
    """

    def __init__(self, how: str, words: str = "", late: bool = False, by: str = "") -> None:
        super().__init__(how)
        self.words, self.late, self.by = words, late, by


@dataclass
class Worker:
    """A process that runs a module, started when something is sent to it.

    module: and its arguments.
    log: what it prints goes here.
    variables: of its environment, beside those of this process.
    """

    module: tuple[str, ...]
    log: Path
    variables: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen | None = None
    _began: int = 0  # where in the log its words about the last line begin
    _heard: bytes = b""

    def send(self, text: str) -> None:
        """Send a line.

        Raises:
            Lost: the process had died since the last line.
        """
        process = self.process or self._start()
        self._began = self.log.stat().st_size
        try:
            process.stdin.write(f"{text}\n".encode())
            process.stdin.flush()
        except BrokenPipeError:
            self.end()
            raise Lost("its process had ended before it could begin") from None

    def answer(self, seconds: float) -> dict:
        """The next line of JSON.

        Raises:
            Lost: the process died, or said nothing for so long.
        """
        line = self._line(seconds)
        if line is None:
            self.end()
            raise Lost(f"no answer in {seconds:.0f} seconds; killed", self._words(), late=True)
        if not line:
            code = self.process.wait()
            self.end()
            by = signal.Signals(-code).name if code < 0 else ""
            how = f"its process ended with {by or f'exit code {code}'}"
            raise Lost(how, self._words(), by=by)
        return json.loads(line)

    def _start(self) -> subprocess.Popen:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-X", "faulthandler", "-m", *self.module],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
                env=importing() | self.variables,
            )
        self._heard = b""
        return self.process

    def _line(self, seconds: float) -> bytes | None:
        """A line of its output; empty if it has ended, None if the time has."""
        end = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._heard:
                if not selector.select(max(0.0, end - time.monotonic())):
                    return None
                part = os.read(self.process.stdout.fileno(), 1 << 16)
                if not part:
                    return b""
                self._heard += part
        line, _, self._heard = self._heard.partition(b"\n")
        return line + b"\n"

    def _words(self) -> str:
        with self.log.open("rb") as log:
            log.seek(self._began)
            return log.read().decode(errors="replace")[-TAIL:].strip()

    def end(self) -> None:
        if self.process is not None:
            kill(self.process)
            self.process.stdin.close()
            self.process.stdout.close()
            self.process = None


def importing() -> dict[str, str]:
    """The variables of a process that imports the benchmarks, wherever it runs."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def kill(process: subprocess.Popen) -> None:
    """End a process and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def answers() -> TextIO:
    """In a worker: where its answers go. What libraries print goes to the log from now on."""
    stream = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return stream


def tell(stream: TextIO, answer: dict | list) -> None:
    print(json.dumps(answer), file=stream, flush=True)


def is_fatal(error: Exception | str) -> bool:
    """Whether the device has failed, by what it says: nothing else can be measured in this process."""
    return any(words in str(error) for words in FATAL)
