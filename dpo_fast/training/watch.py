"""Health while a run goes on: what is measured once, what is told, and whether the run is to stop."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dpo_fast.data.kinds import PAIRS, Kind
from dpo_fast.errors import Unhealthy, UserError
from dpo_fast.health import TOLD, Monitor
from dpo_fast.training import distributed
from dpo_fast.training.config import RunConfig
from dpo_fast.training.console import say
from dpo_fast.training.loggers import Guarded

OF_PAIRS = ("length_drift", "length_shortcut", "contradictory", "nearly_equal")
OF_SEVERAL = ("always_chosen", "always_rejected")  # answers of one prompt, which are compared
COUNT = "health/findings"


class Watch:
    """Rank 0 looks at every line of metrics. Every rank asks whether to stop.

    new: names of what the last lines told for the first time and health.stop_on has.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.monitor = Monitor(config.resolved())
        self.new: list[str] = []

    def resume(self, file: Path) -> None:
        """Take up the lines that a resumed run has written. What they told is not told again."""
        lines = (json.loads(line) for line in file.read_text().splitlines())
        self.monitor = Monitor(self.config.resolved(), lines)

    def look(self, line: dict[str, Any], loggers: Iterable[Guarded] = ()) -> dict[str, Any]:
        """What a line gets beside its metrics: how many findings stand, and the words of new ones."""
        found = self.monitor.look(line)
        for name, text in found.items():
            say(f"health: {name}: {text}", matters=True)
            for logger in loggers:
                logger.tell(line["step"], name, text)
        self.new += [name for name in found if name in self.config.health.stop_on]
        return {COUNT: len(self.monitor.standing)} | ({TOLD: found} if found else {})

    def stops(self) -> bool:
        """Whether something was found that health.stop_on names. Collective."""
        return bool(self.config.health.stop_on) and distributed.any_rank(bool(self.new))

    def raise_unhealthy(self, folder: Path) -> None:
        """Raises Unhealthy on every rank if `stops`. folder: the checkpoint. Collective."""
        if self.stops():
            names = distributed.from_main(lambda: self.new)
            raise Unhealthy(
                f"stopped by health.stop_on={', '.join(names)}; the checkpoint is {folder}. What was told "
                "once stops no more: train.resume_from_checkpoint=true goes on"
            )


def check_kind_of_findings(config: RunConfig, kind: Kind) -> None:
    """Raises UserError for a finding of health.stop_on that examples of this kind cannot give."""
    for name in config.health.stop_on:
        if name in OF_PAIRS and kind != PAIRS:
            wants = "pairs"
        elif name in OF_SEVERAL and kind.single:
            wants = "pairs or groups"
        else:
            continue
        raise UserError(
            f"health.stop_on={name} needs {wants}, and data.train holds {kind.name}; leave it out"
        )
