"""Nothing that is said ends a command: closed pipes, full disks, closed descriptors."""

import errno
import os
import subprocess
import sys

import pytest

pytest.importorskip("deepspeed")

from dpo_fast.cli.streams import Lossy
from tests.support.paths import ENVIRONMENT

FULL = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")


def lossy(file) -> Lossy:
    return Lossy(open(file, "w"))  # noqa: SIM115


@FULL
def test_a_full_disk_loses_lines():
    stream = lossy("/dev/full")
    for _ in range(3):
        assert stream.write("x" * 20_000) == 20_000
        stream.flush()
    stream.give_up()
    print("after", file=stream, flush=True)
    stream.close()


def test_a_reader_that_went_away_loses_lines_and_a_disk_that_is_cleared_none(tmp_path):
    read, write = os.pipe()
    stream = lossy(write)
    os.close(read)
    for _ in range(3):
        print("x" * 20_000, file=stream, flush=True)
    stream.close()
    good = lossy(tmp_path / "log")
    good._failed(OSError(errno.ENOSPC, "No space left on device"))
    print("again", file=good, flush=True)
    assert (tmp_path / "log").read_text() == "again\n"


def dpo_fast(redirection: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "dpo_fast", *arguments]
    return subprocess.run(
        ["sh", "-c", f'"$@" {redirection}', "sh", *command],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
    )


@FULL
@pytest.mark.processes
def test_what_a_command_is_for_is_not_lost_silently():
    done = dpo_fast(">/dev/full", "config", "schema")
    assert done.returncode == 2
    assert done.stderr == "dpo-fast: cannot write to standard output: No space left on device\n"


@pytest.mark.processes
@pytest.mark.parametrize("redirection", ["2>&-", ">&- 2>&-", "<&- >&- 2>&-", "2>/dev/full"])
def test_a_command_without_standard_error_has_its_exit_code(redirection, tmp_path):
    assert dpo_fast(redirection, "train", str(tmp_path / "none.yaml")).returncode == 2
