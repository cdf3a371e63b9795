"""What the operating system refuses is one sentence, whichever call met it; what is ours is none."""

import errno
import os
import subprocess
import sys

import pytest

from dpo_fast.cli.system_errors import REMEDIES, explained
from tests.support.paths import ENVIRONMENT


@pytest.mark.parametrize("number", REMEDIES, ids=errno.errorcode.get)
def test_each_reason_names_the_file_and_the_remedy(number):
    told = explained(OSError(number, os.strerror(number), "runs/mine/\x1b[2J", None, "other"))
    assert "runs/mine/" in told and os.strerror(number) in told
    assert REMEDIES[number] in told and "Errno" not in told


def test_the_errors_that_python_raises(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    for call, words in (
        (lambda: (tmp_path / "file" / "x").read_text(), "file/x: Not a directory; a file stands"),
        (lambda: tmp_path.write_text("x"), "Is a directory; a folder stands where a file"),
        (lambda: (tmp_path / "none").read_bytes(), "none: No such file or directory; it was moved"),
        (lambda: (tmp_path / "a").read_bytes(), "go round in a circle"),
        (lambda: (tmp_path / ("x" * 300)).touch(), "File name too long; shorten the path"),
        (lambda: (tmp_path / "file").rename(tmp_path / "no" / "x"), "(to become "),
        (lambda: (tmp_path / "file").mkdir(), "File exists; something else has this name"),
    ):
        with pytest.raises(OSError) as error:
            call()
        assert words in explained(error.value)


def test_limits_are_told_without_a_file():
    assert "ulimit -n" in explained(OSError(errno.EMFILE, "Too many open files"))
    assert "ulimit -n" in explained(
        RuntimeError("[enforce fail at tcp/device.cc:1] Too many open files")
    )
    assert "more memory" in explained(OSError(errno.ENOMEM, "Cannot allocate memory"))
    full = OSError(errno.ENOSPC, "No space left on device")
    assert explained(full) == "cannot write to standard output: No space left on device"


def test_a_library_may_name_one_as_its_cause():
    def load():
        try:
            raise PermissionError(errno.EACCES, "Permission denied", "weights")
        except OSError as error:
            raise RuntimeError("cannot load") from error

    with pytest.raises(RuntimeError) as error:
        load()
    assert explained(error.value).startswith("weights: Permission denied; look at who may read")


@pytest.mark.parametrize(
    "error",
    [
        ZeroDivisionError("by zero"),
        ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
        BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"),
        OSError("a library's own words"),
        OSError(errno.ENOENT, "No such file or directory"),
    ],
)
def test_what_names_no_file_keeps_its_traceback(error):
    assert explained(error) is None


LIMITED = """
import resource, sys
from dpo_fast.cli import app
def fail(*_, **__):
    resource.setrlimit(resource.RLIMIT_NOFILE, (8, 8))
    kept = [open(sys.argv[0]) for _ in range(9)]
app.app = fail
app.main()
"""


@pytest.mark.processes
def test_a_process_without_descriptors_ends_with_a_sentence(tmp_path):
    (tmp_path / "command.py").write_text(LIMITED)
    done = subprocess.run(
        [sys.executable, tmp_path / "command.py"], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith("dpo-fast: ") and "Too many open files; raise" in done.stderr
