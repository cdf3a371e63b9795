"""How a run ends before its time: SIGINT, SIGTERM, a loss that is not finite."""

from __future__ import annotations

import signal

from dpo_fast.errors import UserError
from dpo_fast.training import distributed
from dpo_fast.training.prepare import Run


class StopSignals:
    """SIGINT and SIGTERM ask for an end after the step; all ranks agree on which step that is."""

    def __init__(self) -> None:
        self.asked = self.raised = False
        self.previous = {
            name: signal.signal(name, self._ask) for name in (signal.SIGINT, signal.SIGTERM)
        }

    def _ask(self, number, frame) -> None:
        if self.asked and number == signal.SIGINT:  # the second Ctrl-C means now
            raise KeyboardInterrupt
        self.asked = True

    def agree(self, finite: bool, run: Run, step: int) -> None:
        self.raised, not_finite = distributed.any_rank(self.asked, not finite)
        if not_finite:
            split, index = run.train.at(step)
            rows = split.sampler.global_batch(index)
            places = ", ".join(split.examples.where(row) for row in rows[:4])
            raise UserError(
                f"the loss of step {step + 1} is not finite; its batch begins with {places}. The last "
                "checkpoint is whole. People usually lower train.learning_rate or check the data there"
            )

    def restore(self) -> None:
        for name, handler in self.previous.items():
            signal.signal(name, handler)
