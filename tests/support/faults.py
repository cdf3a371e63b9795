"""Runs on two ranks that something is done to, as a command (tests/training/test_faults.py)."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
import yaml

from tests.support.paths import ENVIRONMENT

# Injections by the hundred: `make faults`.
SLOW = pytest.mark.skipif(
    os.environ.get("DPO_FAST_SLOW", "0") != "1", reason="many injections: DPO_FAST_SLOW=1 runs them"
)
MARK = "DPO_FAST_TEST_RUN"
PYTHON = [sys.executable, "-m"]
LAUNCHERS = {
    "nproc": [*PYTHON, "dpo_fast", "train", "{file}", "--nproc", "2"],
    "torchrun": [
        *(*PYTHON, "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d"),
        *("--rdzv_endpoint=localhost:0", "-m", "dpo_fast", "train", "{file}"),
    ],
    "deepspeed": [
        *(*PYTHON, "deepspeed.launcher.runner", "--num_gpus=2", "--module", "dpo_fast"),
        *("train", "{file}"),
    ],
    "alone": [*PYTHON, "dpo_fast", "train", "{file}"],
}


class FaultyRun:
    """A command of its own session, and all processes that come of it.

    prefix: words before the command. file: its configuration, with the log beside it.
    """

    def __init__(
        self,
        tree: dict,
        launcher: str = "nproc",
        prefix=(),
        file: Path | None = None,
        **environment: str,
    ) -> None:
        self.root, self.mark = Path(tree["train"]["output_dir"]), uuid.uuid4().hex
        file = file or self.root.with_suffix(".yaml")
        file.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
        self.log = file.with_suffix(".log").open("w+", errors="replace")
        words = [*prefix, *(word.format(file=file) for word in LAUNCHERS[launcher])]
        self.process = subprocess.Popen(
            words,
            env=ENVIRONMENT | {MARK: self.mark, "OMP_NUM_THREADS": "1"} | environment,
            stdout=self.log,
            stderr=self.log,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )

    def said(self) -> str:
        self.log.seek(0)
        return self.log.read()

    def steps(self) -> int:
        """Lines of steps that are logged."""
        with contextlib.suppress(OSError):
            return (self.root / "metrics.jsonl").read_text().count('"loss"')
        return 0

    def wait_for_steps(self, count: int, seconds: float = 240) -> None:
        self._wait(lambda: self.steps() >= count, seconds)

    def wait_until_said(self, words: str, seconds: float = 240) -> None:
        self._wait(lambda: words in self.said(), seconds)

    def processes(self) -> dict[int, int | None]:
        """Of this run: rank by process, None for launchers. Those that have ended are none."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
                values = dict(word.partition("=")[::2] for word in words)
                if values.get(MARK) == self.mark:
                    found[int(folder.name)] = int(values["RANK"]) if "RANK" in values else None
        return found

    def hit(self, whom: str | int, number: int) -> None:
        """Send a signal: to `launcher`, to `all`, or to a rank."""
        ranks = self.processes()
        targets = {"launcher": [self.process.pid], "all": list(ranks)}
        pids = targets.get(whom, [pid for pid, rank in ranks.items() if rank == whom])
        assert pids, f"{whom} has no process; {self.said()[-3000:]}"
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def ranks_end(self, within: float, but: int | None = None) -> float:
        """Seconds until no rank is left, but for one; it fails if that takes longer."""
        return self._wait(
            lambda: all(rank in (None, but) for rank in self.processes().values()), within
        )

    def ends(self, within: float) -> float:
        """Seconds until no process is left, launchers too; it fails if that takes longer."""
        return self._wait(lambda: self.process.poll() is not None and not self.processes(), within)

    @property
    def code(self) -> int:
        return self.process.wait(60)

    def _wait(self, done, seconds: float) -> float:
        begin = time.monotonic()
        while not done():
            if time.monotonic() > begin + seconds:
                left = self.processes()
                self.kill()
                raise AssertionError(f"not within {seconds} s, {left} left; {self.said()[-6000:]}")
            time.sleep(0.02)
        return time.monotonic() - begin

    def kill(self) -> None:
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


def result(root: Path) -> tuple:
    """What must be the same of two runs: the trained model, and every number that measures no time."""
    lines = [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
    numbers = [{k: v for k, v in line.items() if not k.startswith("perf/")} for line in lines]
    return (root / "final" / "model.safetensors").read_bytes(), numbers
