"""The lines of somebody's own code among those that an error came through."""

from __future__ import annotations

import re
import sysconfig
import traceback
from pathlib import Path
from types import TracebackType

LIBRARIES = (str(Path(__file__).parent), sysconfig.get_path("stdlib"), "<")
INSTALLED = re.compile(r"[/\\](site-packages|dist-packages|IPython)[/\\]")
TYPED = ("<stdin>", "<ipython-input", "<python-input")  # what has no file and is somebody's own


def own_frames(trace: TracebackType | None) -> list[traceback.FrameSummary]:
    """Those of no library and not of ours, the outermost first."""
    return [frame for frame in traceback.extract_tb(trace) if _is_own(frame.filename)]


def _is_own(file: str) -> bool:
    return file.startswith(TYPED) or not (file.startswith(LIBRARIES) or INSTALLED.search(file))
