"""The callbacks of a run: found by name, called on every rank, and what they ask for brought together."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from dpo_fast.errors import UserError
from dpo_fast.losses.custom import loaded, told
from dpo_fast.models.decoder import kept_attention
from dpo_fast.training import distributed, signals
from dpo_fast.training.callbacks import EVENTS, Callback, Control, RunState
from dpo_fast.training.config import RunConfig
from dpo_fast.training.console import say
from dpo_fast.training.own_code import CALLBACKS, find
from dpo_fast.training.prepare import Run
from dpo_fast.training.trainer_callback import OfTransformers, check_callback

OPTION = "train.callbacks"
RESUME = "train.resume_from_checkpoint"
STATE = "callbacks"  # in state.json


def open_callbacks(config: RunConfig) -> dict[str, Callback]:
    """The callbacks of train.callbacks, by their names and in their order.

    Raises:
        UserError: one cannot be found or made, or is none.
    """
    found: dict[str, Callback] = {}
    for entry in config.train.callbacks:
        name, options = (entry, {}) if isinstance(entry, str) else next(iter(entry.items()))
        if name in found:
            raise UserError(f"{OPTION} names {name} twice; name it once")
        found[name] = _made(name, options, config)
    return found


def _made(name: str, options: Mapping[str, Any], config: RunConfig) -> Callback:
    where, found = f"{OPTION}={name}", find(name, OPTION, CALLBACKS)
    if isinstance(found, type):
        kind = found
        found = loaded(where, lambda: kind(**options))
    elif options:
        raise UserError(f"{where} is an object that is made already: it takes no options")
    if isinstance(found, TrainerCallback):
        check_callback(found, where)
        return OfTransformers(found, config)
    if not isinstance(found, Callback):
        raise UserError(
            f"{where} is a {type(found).__name__}: expected a subclass of dpo_fast.Callback, or "
            "of transformers' TrainerCallback"
        )
    for own in dir(found):
        if own.startswith("on_") and own not in EVENTS and callable(getattr(found, own)):
            near = difflib.get_close_matches(own, EVENTS, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(EVENTS)}"
            raise UserError(f"{where} has {own}, which nothing calls: {hint}")
    return found


class Calls:
    """Calls callbacks. Every rank has one and calls it at the same places.

    stopped: whether a callback has asked for the end of the run.
    error: what a callback has failed with, on any rank; the run ends by it after its step.
    """

    def __init__(self, run: Run, callbacks: Mapping[str, Callback]) -> None:
        self.run, self.callbacks = run, callbacks
        self.stopped, self.error = False, ""
        self._kept: dict[str, Any] = {}  # the latest that the callbacks gave to be kept
        self._asked = Control()
        self._cause: BaseException | None = None  # of this rank's
        self._pressed = False
        self._state = RunState(
            step=0,
            total_steps=run.total_steps,
            epoch=run.train.epochs(0),
            examples=0,
            logged={},
            metrics={},
            output_dir=Path(run.config.train.output_dir),
            checkpoint=None,
            final=None,
            model=run.model.causal_lm,
            tokenizer=run.tokenizer,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
        )

    def goes_on_from(self, checkpoint: Path, state: dict[str, Any]) -> None:
        """Take up where a checkpoint was written. Raises UserError.

        state: the content of its state.json.
        """
        examples = state.get("examples", state["step"] * self.run.config.train.global_batch_size)
        self._state = replace(self._state, checkpoint=checkpoint, examples=examples)
        kept = state.get(STATE, {})
        if gone := [name for name in kept if name not in self.callbacks]:
            say(
                f"{checkpoint} is of a run with the callbacks {', '.join(gone)}, which this one lacks"
            )
        self._kept = {name: kept[name] for name in self.callbacks if name in kept}
        for name in kept.keys() & self.callbacks.keys():
            if kept[name]:
                where = f"{OPTION}={name}, load_state_dict"
                loaded(where, partial(self.callbacks[name].load_state_dict, kept[name]))

    def begin(self, step: int) -> None:
        """on_train_begin, after `step` steps. Collective. Raises UserError."""
        self._at(step)
        self._call("on_train_begin")
        self._keep()  # what cannot be kept is told before the first step
        self.raise_error()

    def step_end(self, step: int, examples: int) -> None:
        """on_step_end. examples: that the step had, on all ranks. Collective."""
        self._at(step)
        self._state = replace(self._state, examples=self._state.examples + examples)
        self._call("on_step_end")

    def logged(self, step: int, line: Mapping[str, Any]) -> None:
        """on_log. line: of metrics.jsonl; what other ranks than the first give is not used. Collective."""
        if not self.callbacks:
            return
        line = distributed.from_main(lambda: dict(line))
        self._at(step)
        self._state = replace(self._state, logged=line, metrics={**self._state.metrics, **line})
        self._call("on_log")

    def evaluated(self) -> None:
        """on_evaluate, of the line that was logged last. Collective."""
        self._call("on_evaluate")

    def saved(self, folder: Path) -> None:
        """on_save. Collective."""
        self._state = replace(self._state, logged={}, checkpoint=folder)
        self._call("on_save")

    def end(self, final: Path) -> None:
        """on_train_end. Collective. Raises UserError."""
        self._state = replace(self._state, logged={}, final=final)
        self._call("on_train_end")
        if self.error:
            raise UserError(
                f"{self.error}. The run is complete, and its model is in {final}"
            ) from self._cause

    def take(self, what: str) -> bool:
        """Whether a callback has asked to log, evaluate or save. It is done with by that."""
        asked = getattr(self._asked, f"should_{what}")
        setattr(self._asked, f"should_{what}", False)
        return asked

    @property
    def asks(self) -> bool:
        """Whether a callback has asked for something that is not done yet."""
        return any(asdict(self._asked).values())

    def state(self) -> dict[str, Any]:
        """For state.json. Of a callback that fails it is what it gave before; the run ends. Collective."""
        if not self.callbacks:
            return {"examples": self._state.examples}
        self._keep()
        return {"examples": self._state.examples, STATE: self._kept}

    def _keep(self) -> None:
        """Ask the callbacks of the first rank what they keep. Collective."""
        if self.error or not self.callbacks:
            return
        self._kept, self.error = distributed.from_main(self._kept_now)

    def _kept_now(self) -> tuple[dict[str, Any], str]:
        kept, error = dict(self._kept), ""
        for name, each in self.callbacks.items():
            try:
                kept[name] = _kept(name, each)
            except UserError as raised:
                error, self._cause = error or str(raised), raised.__cause__
        return kept, error

    def raise_error(self) -> None:
        """Raises UserError if a callback has failed. By now the step is saved."""
        saved = self._state.checkpoint
        how = (
            "No step was taken"
            if saved is None
            else f"Go on with {RESUME}={saved} once it is mended"
        )
        if self.error:
            raise UserError(f"{self.error}. {how}") from self._cause

    def _at(self, step: int) -> None:
        epoch = self.run.train.epochs(step)
        self._state = replace(self._state, step=step, epoch=epoch, logged={})

    def _call(self, event: str) -> None:
        """Call all callbacks, and agree with other ranks on what they ask for. Collective."""
        if not self.callbacks or self.error:
            return
        control, error = Control(), ""
        with self._as_it_was():
            for name, callback in self.callbacks.items():
                try:
                    getattr(callback, event)(self._state, control)
                except signals.StopNow:
                    raise
                except (Exception, SystemExit, KeyboardInterrupt) as raised:
                    if isinstance(raised, KeyboardInterrupt) and self._interrupted():
                        continue
                    self._cause = raised
                    error = f"{OPTION}={name}, {event}: {told(raised)}"
                    break
        self._agree(event, control, error)

    def _interrupted(self) -> bool:
        """A callback's own KeyboardInterrupt, as of input(), is Ctrl-C: once. Whether it will be heard."""
        self._pressed = self._pressed or signals.press()
        return self._pressed

    @contextmanager
    def _as_it_was(self) -> Iterator[None]:
        """What a callback draws or sets does not change the run: it may sample, or call model.eval()."""
        model, device = self._state.model, distributed.device()
        training = model.training
        drawn = torch.random.fork_rng([device] if device.type == "cuda" else [])
        with drawn, kept_attention(model):
            yield
        if model.training != training:
            model.train(training)

    def _agree(self, event: str, control: Control, error: str) -> None:
        found = distributed.gathered((asdict(control), error))
        self.error = next((each for _, each in found if each), "")
        for name in asdict(control):
            if any(asked[name] for asked, _ in found):
                setattr(self._asked, name, True)
        if self._asked.should_training_stop and not self.stopped:
            self.stopped = True
            say(f"a callback ends the run after step {self._state.step}", matters=True)
        self._asked.should_training_stop = False
        if self._asked.should_evaluate and self.run.eval is None and not self.error:
            self.error = (
                f"{OPTION}: {event} asks for an evaluation (should_evaluate), but there is nothing to "
                "evaluate on: set data.eval or data.eval_rows"
            )


def _kept(name: str, callback: Callback) -> Any:
    where = f"{OPTION}={name}, state_dict"
    found = loaded(where, callback.state_dict)
    try:
        return json.loads(json.dumps(found, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{where} gave what JSON does not hold: {error}") from None
