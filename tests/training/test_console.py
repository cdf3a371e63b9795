"""What rank 0 says: lines without a terminal, a bar with one, and little with --quiet."""

import os
import pty
import subprocess
import sys

import pytest

pytest.importorskip("rich")

from dpo_fast import progress
from dpo_fast.training import console
from tests.support.paths import ENVIRONMENT

BAR = """
import time
from dpo_fast.training.console import progress_bar, say
with progress_bar("training", 3000) as advance:
    for _ in range(3000):
        advance("loss 0.693 acc 0.500 margin 0.000 12,345 tok/s")
    say("a line")
"""


@pytest.fixture
def hushed():
    progress.hush()
    yield
    progress.hush(False)


def test_quiet_leaves_what_matters(hushed, capsys):
    console.say("step 1")
    console.say("health: loss_flat", matters=True)
    with console.progress_bar("training", 2) as advance, progress.shown("reading", 2) as read:
        advance("text")
        read(1)
    out, err = capsys.readouterr()
    assert (out, err) == ("", "health: loss_flat\n")


@pytest.mark.processes
def test_without_a_terminal_there_are_plain_lines():
    ended = subprocess.run(
        [sys.executable, "-c", BAR], env=ENVIRONMENT, capture_output=True, text=True, check=True
    )
    assert ended.stderr == "a line\n" and not ended.stdout


@pytest.mark.processes
def test_on_a_narrow_terminal_the_counts_stay_whole():
    main, other = pty.openpty()
    environment = ENVIRONMENT | {"COLUMNS": "80", "NO_COLOR": "1", "TERM": "xterm"}
    process = subprocess.Popen([sys.executable, "-c", BAR], env=environment, stderr=other)
    os.close(other)
    text = b""
    while True:
        try:
            text += os.read(main, 65536)
        except OSError:  # the other end is closed
            break
    os.close(main)
    assert process.wait() == 0
    shown = text.decode()
    assert "3000/3000" in shown and "0:00:00" in shown and "loss 0.693 acc 0.500" in shown
    assert "a line" in shown and "\x1b[3" not in shown and "\x1b[1m" not in shown
