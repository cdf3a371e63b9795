"""Callbacks of transformers (TrainerCallback) in a run of ours: what they get, and what is refused.

They get `args`, `state`, `control` and the keywords `model`, `processing_class`, and `logs` or `metrics`,
as from transformers' Trainer. What only a loop of transformers could honour is refused by name.
"""

from __future__ import annotations

import math
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import ExportableState

from dpo_fast.errors import UserError
from dpo_fast.training.callbacks import Callback, Control, RunState
from dpo_fast.training.config import RunConfig

NEVER = (
    *("on_step_begin", "on_substep_end", "on_pre_optimizer_step", "on_optimizer_step"),
    "on_prediction_step",
)
SHOWN = ("ProgressCallback", "PrinterCallback", "NotebookProgressCallback", "DefaultFlowCallback")


def check_callback(theirs: TrainerCallback, where: str) -> None:
    """Raises UserError for one that cannot be honoured, with what to do instead."""
    name, module = type(theirs).__name__, type(theirs).__module__
    told = f"{where} is {name} of {module.partition('.')[0]}"
    if name == "EarlyStoppingCallback":
        options = f"train.early_stopping_patience={theirs.early_stopping_patience}"
        if theirs.early_stopping_threshold:
            options += f" and train.early_stopping_threshold={theirs.early_stopping_threshold}"
        raise UserError(f"{told}: set {options} instead")
    if name in SHOWN and module.startswith("transformers."):
        raise UserError(f"{told}: a run shows its progress itself; leave it out")
    if module.startswith("transformers.integrations"):
        raise UserError(f"{told}: name the logger in log.report_to instead")
    if module.startswith("trl."):
        raise UserError(
            f"{told}, whose trainer it needs; answers while training are the section generate"
        )
    for event in NEVER:
        if getattr(type(theirs), event) is not getattr(TrainerCallback, event):
            raise UserError(
                f"{where} has {event}, which a run of ours does not call: its steps end with on_step_end"
            )


class Arguments:
    """What a callback may read of `args`: the options of a run by transformers' names."""

    def __init__(self, config: RunConfig, state: RunState) -> None:
        train = config.train
        for name, value in train.model_dump().items():
            setattr(self, name, value)
        self.learning_rate, self.max_steps = config.learning_rate, state.total_steps
        self.logging_steps, self.run_name = config.log.logging_steps, config.run_name
        self.report_to = list(config.log.report_to)
        self.per_device_train_batch_size = train.micro_batch_size
        self.eval_strategy = "steps" if train.eval_steps else "no"
        self.save_strategy = "steps" if train.save_steps else "no"
        self.logging_strategy, self.world_size = "steps", state.world_size
        self.process_index = state.rank

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"args.{name} is no option of a run of ours (docs/CONFIG.md)")


class OfTransformers(Callback):
    """A TrainerCallback as a callback of ours."""

    def __init__(self, theirs: TrainerCallback, config: RunConfig) -> None:
        self.theirs, self.config = theirs, config
        self.history: list[dict[str, Any]] = []
        self.epoch = 0  # the epochs that have ended

    def on_train_begin(self, state: RunState, control: Control) -> None:
        self.epoch = int(state.epoch or 0)
        for event in ("on_init_end", "on_train_begin", "on_epoch_begin"):
            self._call(event, state, control)

    def on_step_end(self, state: RunState, control: Control) -> None:
        self._call("on_step_end", state, control)
        if state.epoch is None or int(state.epoch) == self.epoch:
            return
        self.epoch = int(state.epoch)
        self._call("on_epoch_end", state, control)
        if state.step < state.total_steps:
            self._call("on_epoch_begin", state, control)

    def on_log(self, state: RunState, control: Control) -> None:
        line = dict(state.logged)
        self.history.append(line)
        logs = {name: value for name, value in line.items() if name != "step"}
        self._call("on_log", state, control, logs=logs)

    def on_evaluate(self, state: RunState, control: Control) -> None:
        self._call("on_evaluate", state, control, metrics=dict(state.logged))

    def on_save(self, state: RunState, control: Control) -> None:
        self._call("on_save", state, control)

    def on_train_end(self, state: RunState, control: Control) -> None:
        self._call("on_train_end", state, control)

    def state_dict(self) -> dict[str, Any]:
        exports = isinstance(self.theirs, ExportableState)  # others may call what they like `state`
        own = {"state": self.theirs.state()} if exports else {}
        return {"history": self.history, **own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.history = list(state["history"])
        if "state" in state:
            self.theirs = type(self.theirs).from_state(state["state"])

    def _call(self, event: str, state: RunState, control: Control, **more: Any) -> None:
        asked = TrainerControl()
        words = {"model": state.model, "processing_class": state.tokenizer, **more}
        told = self._state(state)
        returned = getattr(self.theirs, event)(Arguments(self.config, state), told, asked, **words)
        asked = asked if returned is None else returned
        if asked.should_epoch_stop:
            raise UserError(
                f"{event} asks for the end of the epoch (should_epoch_stop), which a run of ours does not "
                "cut short: ask for the end of training"
            )
        for name in Control.__slots__:
            if getattr(asked, name):
                setattr(control, name, True)

    def _state(self, state: RunState) -> TrainerState:
        train = self.config.train
        return TrainerState(
            epoch=state.epoch or 0.0,
            global_step=state.step,
            max_steps=state.total_steps,
            logging_steps=self.config.log.logging_steps,
            eval_steps=train.eval_steps or state.total_steps,
            save_steps=train.save_steps or state.total_steps,
            train_batch_size=train.micro_batch_size,
            num_train_epochs=math.ceil(train.num_train_epochs),
            log_history=self.history,
            best_metric=state.metrics.get("best_metric"),
            best_global_step=state.metrics.get("best_step"),
            is_local_process_zero=state.is_main,
            is_world_process_zero=state.is_main,
        )
