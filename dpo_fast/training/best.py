"""The best checkpoint of a run by a metric of its evaluations, and the end where none is better.

Rank 0 decides from its numbers. What is known stands in every state.json, so that a resumed run decides
as the uninterrupted one, and in best.json for people.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dpo_fast import durable
from dpo_fast.errors import UserError
from dpo_fast.training import distributed
from dpo_fast.training.checkpoint_weights import read_on_main
from dpo_fast.training.checkpoints import PREFIX, check_whole, is_checkpoint, saving
from dpo_fast.training.config import RunConfig
from dpo_fast.training.console import say
from dpo_fast.training.selection import EVALUATION, Selection, hint, selection_of

FILE = "best.json"


@dataclass
class Found:
    """A value of the metric, and the step it was found at."""

    step: int
    value: float


class Best:
    """What was best so far. Every rank calls; without a selection nothing happens.

    peak: the best evaluation. worse: evaluations since the last that improved on it enough.
    kept: the best evaluation that has a checkpoint, which is `folder`.
    """

    def __init__(self, config: RunConfig) -> None:
        self.selection: Selection | None = selection_of(config.train)
        self.root = Path(config.train.output_dir)
        self.latest: Found | None = None
        self.peak: Found | None = None
        self.kept: Found | None = None
        self.folder: Path | None = None
        self.worse = 0

    @property
    def exhausted(self) -> bool:
        """Whether the run ends early."""
        patience = self.selection.patience if self.selection else None
        return patience is not None and self.worse >= patience

    def note(self, step: int, metrics: dict[str, Any], answers: bool = False) -> dict[str, Any]:
        """Take in the metrics of an evaluation; returns them, with what is best. Collective.

        That of step 0 is no candidate. Raises UserError if it lacks the metric.

        answers: whether they are of held-out prompts that were answered. A judge that failed leaves out
            what it would have told, and nothing is compared then.
        """
        if self.selection is None or self.selection.of_answers != answers:
            return metrics
        if answers and self.selection.metric not in metrics:
            return metrics
        if self.selection.metric not in metrics:
            known = [n.removeprefix(EVALUATION) for n in metrics if n.startswith(EVALUATION)]
            bare = self.selection.metric.removeprefix(EVALUATION)
            raise UserError(f"train.metric_for_best_model={bare}: {hint(bare, known)}")
        if step == 0:
            return metrics
        value = distributed.from_main(lambda: metrics[self.selection.metric])
        self.latest = Found(step, value)
        improved = self._improves(value)
        self.worse = 0 if improved else self.worse + 1
        if self._beats(value, self.peak):
            self.peak = self.latest
        if self.exhausted:
            say(self._why(step))
        found = {"best_metric": self.peak.value, "best_step": self.peak.step} if self.peak else {}
        return metrics | found

    def keep(self, step: int) -> None:
        """The checkpoint of a step is there, or will be: it may be the best one."""
        if self.latest is None or self.latest.step != step:
            return  # a signal came before it was evaluated
        if self._beats(self.latest.value, self.kept):
            before = f", before {self.kept.value:.6g} at step {self.kept.step}" if self.kept else ""
            name = self.selection.metric
            say(f"{PREFIX}{step} is the best so far: {name} {self.latest.value:.6g}{before}")
            self.kept, self.folder = self.latest, self.root / f"{PREFIX}{step}"

    @property
    def kept_name(self) -> str | None:
        """The name of the best checkpoint in the run's own folder, which is not to be removed."""
        own = self.folder is not None and self.folder.parent == self.root
        return self.folder.name if own else None

    def state(self) -> dict[str, Any]:
        """For state.json; nothing without a selection."""
        if self.selection is None:
            return {}
        known = {"metric": self.selection.metric, "greater_is_better": self.selection.greater}
        known |= {"peak": _listed(self.peak), "kept": _listed(self.kept), "worse": self.worse}
        place = None if self.folder is None else self.kept_name or str(self.folder.absolute())
        return {"best": known | {"checkpoint": place}}

    def load(self, state: dict[str, Any], checkpoint: Path, goes_on: bool = False) -> None:
        """Go on as the run of a checkpoint. state: the content of its state.json.

        goes_on: whether the run had ended, and is to be longer: patience begins anew.

        Raises:
            UserError: its evaluations were compared by another metric, or its best checkpoint is gone.
        """
        if self.selection is None:
            return
        known = state.get("best")
        if known is None:
            say(f"{checkpoint} does not know which checkpoint was the best: it counts from here on")
            return
        for option, now in (
            ("metric", self.selection.metric),
            ("greater_is_better", self.selection.greater),
        ):
            if known[option] != now:
                name = "metric_for_best_model" if option == "metric" else option
                raise UserError(
                    f"{checkpoint} cannot be resumed exactly: train.{name} was {known[option]} and is "
                    f"{now}, by which its evaluations were not compared. Set it back"
                )
        self.peak, self.kept = _found(known["peak"]), _found(known["kept"])
        self.worse = 0 if goes_on else known["worse"]
        if known["checkpoint"] is not None:
            self._find(checkpoint.absolute().parent / known["checkpoint"])
        if self.exhausted:
            say(f"{self._why(state['step'])}. To train on, raise it")

    def write(self) -> None:
        """Bring best.json up to date, after a checkpoint. One rank writes."""
        self.writing()()

    def writing(self) -> Callable[[], None]:
        """What writes best.json as it is to be now, for when the checkpoint that it names is there."""
        if self.selection is None or self.kept is None or not distributed.is_main():
            return lambda: None
        content = {
            "metric": self.selection.metric,
            "greater_is_better": self.selection.greater,
            "value": self.kept.value,
            "step": self.kept.step,
            "checkpoint": self.kept_name or str(self.folder),
            "stopped_early": self.exhausted,
        }
        text = json.dumps(content, indent=2) + "\n"

        def write() -> None:
            with saving(self.root / FILE):
                durable.write_file(self.root / FILE, text)

        return write

    def weights(self, model: nn.Module, step: int) -> dict[str, Tensor] | None:
        """The trained tensors of the best checkpoint on rank 0, {} elsewhere; None for those of now.

        step: which the model has taken. Raises UserError if the checkpoint cannot be read.
        """
        if self.selection is None or not self.selection.load or self.kept is None:
            return None
        say(
            f"the best is {self.folder.name}: {self.selection.metric} {self.kept.value:.6g} at step "
            f"{self.kept.step} of {step}"
        )
        if self.kept.step == step and self.kept_name:
            return None
        try:
            check_whole(self.folder)
            return read_on_main(self.folder, model)
        except UserError as error:
            raise UserError(
                f"{error}. The last weights are exported with train.resume_from_checkpoint=true "
                "train.load_best_model_at_end=false"
            ) from None

    def _find(self, folder: Path) -> None:
        """Take a folder for the best checkpoint, if it is there."""
        if folder.parent.resolve() == self.root.resolve():
            folder = self.root / folder.name
        if is_checkpoint(folder):
            self.folder = folder
            return
        what = f"the best checkpoint so far, {folder}, is not there"
        if self.selection.load:
            raise UserError(
                f"{what}: bring it back, or resume with train.load_best_model_at_end=false, which exports "
                "the last weights"
            )
        say(f"{what}; the best of those to come is kept")
        self.kept = None

    def _beats(self, value: float, found: Found | None) -> bool:
        if math.isnan(value):
            return False
        return found is None or self.selection.better(value, found.value)

    def _improves(self, value: float) -> bool:
        """Whether patience begins anew, by the rule of transformers' EarlyStoppingCallback."""
        enough = self.peak is None or abs(value - self.peak.value) > self.selection.threshold
        return enough and self._beats(value, self.peak)

    def _why(self, step: int) -> str:
        chosen, times = self.selection, self.worse
        best = f"; the best was {self.peak.value:.6g} at step {self.peak.step}" if self.peak else ""
        least = f" by more than {chosen.threshold:g}" if chosen.threshold else ""
        return (
            f"the run ends early, after step {step}: {chosen.metric} has not improved{least} for "
            f"{times} evaluation{'s' if times > 1 else ''} (train.early_stopping_patience="
            f"{chosen.patience}){best}"
        )


def _listed(found: Found | None) -> list | None:
    return None if found is None else [found.step, found.value]


def _found(listed: list | None) -> Found | None:
    return None if listed is None else Found(*listed)
