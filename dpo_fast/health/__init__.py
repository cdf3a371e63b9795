"""Whether a run is well: one set of rules, for the live run and for the report.

history.py   the metrics of a run, line by line, and what of its configuration the rules need
courses.py   where a curve starts and ends, and how much of that is noise
curves.py    rules on curves: loss, accuracy, log-probs, margin, entropy, gradients, length
data.py      rules on what was measured of the data and of the start
findings.py  the table of rules
monitor.py   what a live run finds, each thing once
"""

from __future__ import annotations

from dpo_fast.health.findings import FINDINGS, Check, examine
from dpo_fast.health.history import TOLD, History, Points, Told
from dpo_fast.health.monitor import Monitor

__all__ = ["FINDINGS", "TOLD", "Check", "History", "Monitor", "Points", "Told", "examine"]
