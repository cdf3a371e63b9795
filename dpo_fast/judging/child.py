"""A program that answers lines: started when it is needed, killed when it takes too long."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence

from dpo_fast.errors import UserError
from dpo_fast.wording import clipped, printable, quoted

MOST_STDERR = 1 << 20  # bytes of standard error that are kept
MOST_ANSWER = 1 << 24  # bytes of a line


class Lost(Exception):
    """No answer: the program has ended, or took too long. The message says which."""


class Child:
    """One process that gets a line on standard input and answers one on standard output.

    hint: what to think of where it takes too long.
    keep_alive: it answers line after line. Otherwise every line has a process of its own, whose standard
        input ends behind the line.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        option: str,
        *,
        hint: str = "",
        keep_alive: bool = True,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.arguments, self.option = list(arguments), option
        self.hint, self.keep_alive = hint, keep_alive
        # What Python prints into a pipe would otherwise wait there until there is much of it.
        self.environment = os.environ | {"PYTHONUNBUFFERED": "1"} | dict(environment or {})
        self.errors = tempfile.TemporaryFile("a+b")  # noqa: SIM115
        self.process: subprocess.Popen | None = None
        self._rest = b""

    def ask(self, line: str, timeout: float) -> str:
        """The answer to a line, without its end. Raises Lost, and UserError if it cannot be started."""
        deadline = time.monotonic() + timeout
        process = self._running()
        try:
            if self.keep_alive:
                self._check_silent(process)
            self._write(process, line.encode("utf-8", "backslashreplace") + b"\n", deadline)
            if not self.keep_alive:
                process.stdin.close()
            return self._read(process, deadline)
        except Lost:
            self.close()
            raise
        finally:
            if not self.keep_alive:
                self.close()

    def greeting(self, timeout: float) -> str:
        """A line that it says by itself when it has started. Raises as `ask`."""
        try:
            return self._read(self._running(), time.monotonic() + timeout)
        except Lost:
            self.close()
            raise

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def close(self) -> None:
        """End it, with what it has started."""
        process, self.process, self._rest = self.process, None, b""
        if process is None:
            return
        with contextlib.suppress(OSError):
            process.stdin.close()
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        process.stdout.close()
        process.wait()

    def _running(self) -> subprocess.Popen:
        if self.running:
            return self.process
        self.close()
        try:
            self.process = subprocess.Popen(
                self.arguments,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.errors,
                env=self.environment,
                start_new_session=True,  # so that what it starts ends with it
            )
        except OSError as error:
            raise UserError(
                f"{self.option}: {self.arguments[0]} cannot be started: {error.strerror or error}; name a "
                "program that is there and may be run"
            ) from None
        os.set_blocking(self.process.stdin.fileno(), False)
        os.set_blocking(self.process.stdout.fileno(), False)
        return self.process

    def _write(self, process: subprocess.Popen, content: bytes, deadline: float) -> None:
        pipe = process.stdin.fileno()
        while content:
            self._wait([], [pipe], deadline)
            try:
                content = content[os.write(pipe, content) :]
            except BlockingIOError:
                continue
            except OSError:
                raise Lost(self._ended(process)) from None

    def _check_silent(self, process: subprocess.Popen) -> None:
        """Raises Lost if it has said more than was asked: all later answers would be of another line."""
        with contextlib.suppress(BlockingIOError):
            self._rest += os.read(process.stdout.fileno(), 1 << 16)
        more, self._rest = self._rest.strip(), b""
        if more:
            told = quoted(more.decode(errors="replace"), 120)
            raise Lost(
                f"it said {told} without being asked. Its standard output is for one answer to each line; "
                "what else it has to say belongs on standard error"
            )

    def _read(self, process: subprocess.Popen, deadline: float) -> str:
        pipe = process.stdout.fileno()
        while b"\n" not in self._rest:
            self._wait([pipe], [], deadline)
            try:
                piece = os.read(pipe, 1 << 16)
            except BlockingIOError:
                continue
            if not piece and self._rest and not self.keep_alive:
                break  # a last line without an end
            if not piece:
                raise Lost(self._ended(process))
            self._rest += piece
            if len(self._rest) > MOST_ANSWER:
                raise Lost(f"it answered more than {MOST_ANSWER >> 20} MiB without a line break")
        line, _, self._rest = self._rest.partition(b"\n")
        return line.decode(errors="replace")

    def _wait(self, reads: list[int], writes: list[int], deadline: float) -> None:
        left, waiting = deadline - time.monotonic(), select.poll()
        for pipe in reads:
            waiting.register(pipe, select.POLLIN)
        for pipe in writes:
            waiting.register(pipe, select.POLLOUT)
        if left <= 0 or not waiting.poll(1000 * left):
            raise Lost(f"it took longer than judge.timeout_seconds{self.hint}{self._said()}")

    def _ended(self, process: subprocess.Popen) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(1.0)
        code = process.poll()
        if code is None:
            return f"it closed its standard output without an answer{self._said()}"
        if code < 0:
            return f"it was killed by {signal.Signals(-code).name}{self._said()}"
        return f"it ended with code {code} and no answer{self._said()}"

    def _said(self) -> str:
        """What stands last on its standard error."""
        size = self.errors.seek(0, os.SEEK_END)
        self.errors.seek(max(size - 2000, 0))
        text = self.errors.read().decode(errors="replace").strip()
        if size > MOST_STDERR:
            self.errors.truncate(0)
        last = " | ".join(line.strip() for line in text.splitlines()[-3:] if line.strip())
        return f". It said: {clipped(printable(last))}" if last else ""
