"""Callbacks: what code of a user's own sees of a run, and what it may ask of it.

Names are those of transformers' TrainerCallback. A callback is called on every rank at the same places.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

EVENTS = ("on_train_begin", "on_step_end", "on_log", "on_evaluate", "on_save", "on_train_end")


@dataclass(frozen=True)
class RunState:
    """Where a run is. All but `rank` is the same on every rank.

    step: optimiser steps taken. total_steps: of the whole run.
    epoch: passes over the data; None of a stream, which does not know how long a pass is.
    examples: pairs, completions, groups or demonstrations that the steps had, on all ranks together.
    logged: the line of metrics.jsonl that `on_log` and `on_evaluate` are about; empty elsewhere.
    metrics: the latest value of every metric.
    output_dir: folder of the run.
    checkpoint: the newest that this process has saved or gone on from; None before the first.
    final: folder of the trained model, in `on_train_end`; None before.
    model: the model of transformers that is trained. Under ZeRO-3 a rank holds parts of its parameters.
    tokenizer: the tokenizer of the run.
    """

    step: int
    total_steps: int
    epoch: float | None
    examples: int
    logged: Mapping[str, Any]
    metrics: Mapping[str, Any]
    output_dir: Path
    checkpoint: Path | None
    final: Path | None
    model: nn.Module = field(repr=False)
    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that writes files: one of all ranks."""
        return self.rank == 0


@dataclass(slots=True)
class Control:
    """What a callback asks for, by transformers' names. One rank that asks is enough.

    should_training_stop: end after this step as after the last one: evaluated, saved and exported. Asked
        in `on_save` or before the first step, the next step is the last.
    should_log, should_evaluate, should_save: do it after this step, though it is not due.
    """

    should_training_stop: bool = False
    should_log: bool = False
    should_evaluate: bool = False
    should_save: bool = False


class Callback:
    """Base class of callbacks: override what you need.

        class StopAt(Callback):
            def __init__(self, loss: float) -> None:
                self.loss = loss

            def on_log(self, state: RunState, control: Control) -> None:
                if state.logged.get("loss", self.loss) < self.loss:
                    control.should_training_stop = True

    A callback that keeps something over an interruption has `state_dict`, which gives what JSON holds, and
    `load_state_dict`, which is called with it before `on_train_begin` of a run that goes on.
    An exception ends the run after its step; a checkpoint is saved.
    """

    def on_train_begin(self, state: RunState, control: Control) -> None:
        """Before the first step, and before the first one after a checkpoint."""

    def on_step_end(self, state: RunState, control: Control) -> None:
        """After every optimiser step, before it is logged, evaluated or saved."""

    def on_log(self, state: RunState, control: Control) -> None:
        """After every line of metrics.jsonl, those of evaluations included."""

    def on_evaluate(self, state: RunState, control: Control) -> None:
        """After an evaluation, which is logged by then."""

    def on_save(self, state: RunState, control: Control) -> None:
        """After a checkpoint. With train.async_save it may still be on its way to the disk."""

    def on_train_end(self, state: RunState, control: Control) -> None:
        """Once the model is exported. Not called if the run was interrupted or has failed."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of it, of rank 0: anything that JSON holds."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave when the checkpoint was saved."""
