"""Callbacks: when they are called, what they see and may ask for, and what is wrong with one."""

import json
import threading
from dataclasses import FrozenInstanceError
from importlib.metadata import EntryPoint

import pytest
import torch

pytest.importorskip("deepspeed")

from dpo_fast import Callback, Control, RunState
from dpo_fast.errors import Interrupted, UserError
from dpo_fast.training import own_code
from dpo_fast.training.calling import open_callbacks
from dpo_fast.training.config import build_config
from dpo_fast.training.own_code import given
from tests.support import ranks
from tests.support.here import train
from tests.support.metrics import lines_of
from tests.support.models import changed, run_tree, write_model, write_pairs

SOURCE = '''
import json
from dpo_fast import Callback

class Told(Callback):
    """Asks on the last rank alone, and writes what every rank has seen."""

    def __init__(self, stop=None, fail=None):
        self.stop, self.fail, self.seen = stop, fail, []

    def on_step_end(self, state, control):
        mine = state.rank == state.world_size - 1
        control.should_training_stop = mine and state.step == self.stop
        if mine and state.step == self.fail:
            raise KeyError("nothing")

    def on_log(self, state, control):
        self.seen.append([state.step, state.examples, dict(state.logged)])
        file = state.output_dir / f"seen-{state.rank}.json"
        file.write_text(json.dumps([self.seen, state.is_main]))
'''


class Recorder(Callback):
    """Keeps every call; asks for what `asks` has for a call of a step."""

    def __init__(self, asks=()):
        self.asks, self.calls, self.states = dict(asks), [], []
        self.kept = {}

    def _note(self, name: str, state: RunState, control: Control) -> None:
        torch.rand(3)  # neither this nor the next lines may change the run
        state.model.eval()
        state.model.set_attn_implementation("eager")
        if name == "step":
            state.model.generate(torch.arange(5, 9)[None], max_new_tokens=2, do_sample=False)
        self.calls.append((name, state.step))
        self.states.append(state)
        for what in self.asks.get((name, state.step), ()):
            setattr(control, f"should_{what}", True)

    def on_train_begin(self, state, control):
        self._note("begin", state, control)

    def on_step_end(self, state, control):
        self._note("step", state, control)

    def on_log(self, state, control):
        self._note("log", state, control)

    def on_evaluate(self, state, control):
        assert "eval_loss" in state.logged
        self._note("evaluate", state, control)

    def on_save(self, state, control):
        self._note("save", state, control)

    def on_train_end(self, state, control):
        self._note("end", state, control)

    def state_dict(self):
        return {"calls": len(self.calls)}

    def load_state_dict(self, state):
        self.kept = state


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("callbacks")
    write_model(folder / "model")
    write_pairs(folder / "pairs.jsonl", 20)
    (folder / "told_callbacks.py").write_text(SOURCE)
    return folder


def tree(folder, name: str, callbacks=(), **options) -> dict:
    found = changed(run_tree(folder, max_steps=4), folder / name, data={"eval_rows": 4})
    found["train"] |= {"callbacks": list(callbacks), **options}
    found["log"] = {"logging_steps": 2}
    found["model"]["lora"] = {"r": 4, "dropout": 0.2}  # draws in training, and in no evaluation
    return found


def run(folder, name: str, callback: Callback, **options) -> None:
    with given({"one": callback}):
        train(build_config(tree(folder, name, ["one"], **options), "case"))


def without_times(lines: list[dict]) -> list[dict]:
    return [
        {k: v for k, v in each.items() if not k.startswith(("perf/", "health"))} for each in lines
    ]


class Leaves(Callback):
    """Raises KeyboardInterrupt, as input() and a library's own handler do, in one of the calls."""

    def __init__(self, event: str) -> None:
        setattr(self, event, self.leave)

    def leave(self, state, control):
        if state.step in (0, 2):
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("event", "steps"), [("on_step_end", 2), ("on_save", 3), ("on_train_begin", 0)]
)
def test_a_keyboard_interrupt_of_a_callback_is_ctrl_c(folder, event, steps):
    """The step is finished, and the next one if it came behind it; a checkpoint is saved."""
    name = f"left-{event}"
    with pytest.raises(Interrupted, match="train.resume_from_checkpoint"):
        run(folder, name, Leaves(event), save_steps=2)
    saved = [int(path.name.partition("-")[2]) for path in (folder / name).glob("checkpoint-*")]
    assert max(saved, default=0) == steps
    if steps:
        run(folder, name, Callback(), resume_from_checkpoint=True)
        assert lines_of(folder / name)[-1]["step"] == 4


def test_a_keyboard_interrupt_in_a_thread_is_an_error_like_others(folder):
    """Signals come to the main thread alone."""
    found = []

    def go() -> None:
        try:
            run(folder, "thread", Leaves("on_step_end"))
        except UserError as error:
            found.append(error)

    thread = threading.Thread(target=go)
    thread.start()
    thread.join()
    assert "on_step_end: " in str(found[0]) and "KeyboardInterrupt" in str(found[0])
    assert (folder / "thread/checkpoint-2").is_dir()


def test_they_are_called_in_order_may_ask_and_change_nothing(folder):
    train(build_config(tree(folder, "plain"), "case"))
    asks = {("step", 1): ["log", "evaluate", "save"], ("log", 3): ["save"], ("evaluate", 1): []}
    recorder = Recorder(asks | {("step", 3): ["log"]})
    run(folder, "asked", recorder)
    assert recorder.calls == [
        *[("begin", 0), ("log", 0), ("evaluate", 0)],
        *[("step", 1), ("log", 1), ("log", 1), ("evaluate", 1), ("save", 1)],
        *[("step", 2), ("log", 2)],
        *[("step", 3), ("log", 3), ("save", 3)],
        *[("step", 4), ("log", 4), ("log", 4), ("evaluate", 4), ("save", 4), ("end", 4)],
    ]
    assert [
        s.examples for (name, _), s in zip(recorder.calls, recorder.states) if name == "step"
    ] == [*[8, 16, 24, 32]]
    last = recorder.states[-1]
    assert last.final == folder / "asked/final" and last.final.is_dir() and last.epoch == 2.0
    assert last.checkpoint == folder / "asked/checkpoint-4" and last.is_main
    assert last.metrics["loss"] == lines_of(folder / "asked")[-2]["loss"] and not last.logged
    with pytest.raises(FrozenInstanceError):
        last.step = 3
    # Evaluations, checkpoints and lines between leave the run as it was, bit for bit.
    assert (
        without_times(lines_of(folder / "plain"))[-1]
        == without_times(lines_of(folder / "asked"))[-1]
    )
    model = "final/adapter_model.safetensors"
    assert (folder / "plain" / model).read_bytes() == (folder / "asked" / model).read_bytes()


def test_one_may_end_the_run_and_what_it_keeps_comes_back(folder, capfd):
    recorder = Recorder({("log", 2): ["training_stop"]})
    run(folder, "stopped", recorder)
    assert recorder.calls[-6:] == [
        *[("step", 2), ("log", 2), ("log", 2), ("evaluate", 2), ("save", 2), ("end", 2)]
    ]
    assert (folder / "stopped/final").is_dir()
    state = json.loads((folder / "stopped/checkpoint-2/state.json").read_text())
    assert state["callbacks"] == {"one": {"calls": 8}} and state["examples"] == 16
    again = Recorder()
    run(folder, "stopped", again, resume_from_checkpoint=True)
    assert again.kept == {"calls": 8} and again.calls[0] == ("begin", 2)
    assert again.states[0].checkpoint == folder / "stopped/checkpoint-2"
    assert again.calls[-1] == ("end", 4) and again.states[-1].examples == 32
    assert capfd.readouterr().err.count("a callback ends the run after step 2") == 1
    # As if it had never been stopped.
    model = "final/adapter_model.safetensors"
    train(build_config(tree(folder, "stopped", resume_from_checkpoint=True), "case"))
    assert "with the callbacks one, which this one lacks" in capfd.readouterr().err
    train(build_config(tree(folder, "whole"), "case"))
    assert (folder / "stopped" / model).read_bytes() == (folder / "whole" / model).read_bytes()


class Fails(Callback):
    def __init__(self, event: str, step: int) -> None:
        def fail(state, control):
            if state.step == step:
                raise ZeroDivisionError("by nothing")

        setattr(self, event, fail)


@pytest.mark.parametrize(
    "event, step, remedy, checkpoint",
    [
        ("on_train_begin", 0, "No step was taken", False),
        ("on_evaluate", 0, "No step was taken", False),
        ("on_step_end", 2, "Go on with train.resume_from_checkpoint=.*checkpoint-2 once", True),
        ("on_save", 4, "Go on with train.resume_from_checkpoint=.*checkpoint-4 once", True),
        ("on_train_end", 4, "The run is complete, and its model is in .*final", True),
    ],
)
def test_an_error_is_told_with_its_place_and_the_step_is_saved(
    folder, event, step, remedy, checkpoint
):
    name = f"{event}-{step}"
    message = rf"train.callbacks=one, {event}: .*test_calling.py, line \d+: ZeroDivisionError"
    with pytest.raises(UserError, match=f"{message}: by nothing. {remedy}") as raised:
        run(folder, name, Fails(event, step))
    assert isinstance(raised.value.__cause__, ZeroDivisionError)
    assert (folder / name / f"checkpoint-{step}").is_dir() == checkpoint


def test_an_evaluation_of_nothing_and_a_state_that_json_does_not_hold_are_refused(folder):
    config = tree(folder, "no-eval", ["one"])
    config["data"] = {k: v for k, v in config["data"].items() if k != "eval_rows"}
    message = "on_step_end asks for an evaluation .*set data.eval or"
    asks = Recorder({("step", 1): ["evaluate"]})
    with given({"one": asks}), pytest.raises(UserError, match=message):
        train(build_config(config, "case"))

    class Odd(Callback):
        def __init__(self, kept):
            self.kept = kept

        def on_step_end(self, state, control):
            if state.step == 2:
                self.kept = {"a": {1, 2}}

        def state_dict(self):
            return self.kept

    message = "train.callbacks=one, state_dict gave what JSON does not hold: .*. "
    with pytest.raises(UserError, match=f"{message}No step was taken"):
        run(folder, "odd", Odd({"best": float("inf")}))
    # What goes wrong later costs no steps: the checkpoint has what was given before.
    with pytest.raises(UserError, match=f"{message}Go on with .*checkpoint-2"):
        run(folder, "later", Odd({"best": 1}), save_steps=2)
    state = json.loads((folder / "later/checkpoint-2/state.json").read_text())
    assert state["callbacks"] == {"one": {"best": 1}}


class Misspelt(Callback):
    def on_step_ends(self, state, control):
        pass


class NoCallback:
    pass


@pytest.mark.parametrize(
    "callbacks, message",
    [
        (["{file}:Gone"], "callbacks.py:Gone: .*told_callbacks.py has no Gone; it has .*Told"),
        (["nobody"], "train.callbacks=nobody: no plugin has this name.*FILE.py:NAME"),
        (["thiers"], "did you mean theirs?"),
        (["misspelt"], "train.callbacks=misspelt has on_step_ends.*did you mean on_step_end?"),
        (
            ["other"],
            "train.callbacks=other is a NoCallback: expected a subclass of dpo_fast.Callback",
        ),
        (
            [{"{file}:Told": {"stp": 3}}],
            r"told_callbacks.py:Told cannot be loaded: .*TypeError.*'stp'",
        ),
        ([{"made": {"a": 1}}], "train.callbacks=made is an object that is made already"),
        (["{file}:Told", "{file}:Told"], "names .*told_callbacks.py:Told twice"),
        ([{"a": {}, "b": {}}], "expected one name with its options"),
    ],
)
def test_what_is_no_callback_is_refused(folder, monkeypatch, callbacks, message):
    plugin = EntryPoint("theirs", "told_callbacks:Told", own_code.CALLBACKS)
    monkeypatch.setattr(own_code, "entry_points", lambda group: [plugin])
    text = json.dumps(callbacks).replace("{file}", str(folder / "told_callbacks.py"))
    objects = {"misspelt": Misspelt(), "other": NoCallback(), "made": Recorder()}
    with given(objects), pytest.raises(UserError, match=message):
        open_callbacks(build_config(tree(folder, "refused", json.loads(text)), "case"))


def test_a_plugin_brings_callbacks_by_its_entry_points(folder, monkeypatch):
    plugin = EntryPoint("theirs", "told_callbacks:Told", own_code.CALLBACKS)
    monkeypatch.setattr(
        own_code, "entry_points", lambda group: [plugin] if group == own_code.CALLBACKS else []
    )
    monkeypatch.syspath_prepend(str(folder))
    found = open_callbacks(build_config(tree(folder, "plugin", [{"theirs": {"stop": 2}}]), "case"))
    assert found["theirs"].stop == 2
    with pytest.raises(AttributeError):
        Control().should_stop = True


@pytest.mark.processes
def test_two_ranks_see_the_same_and_one_that_asks_or_fails_is_enough(folder):
    name = str(folder / "told_callbacks.py:Told")
    base = changed(tree(folder, "two"), folder / "two", train={"micro_batch_size": 2})
    base["train"]["callbacks"] = [{name: {"stop": 3}}]
    ranks.train([base], ranks=2)
    assert [line["step"] for line in lines_of(folder / "two") if "loss" in line] == [2, 3]
    assert (folder / "two/checkpoint-3").is_dir() and (folder / "two/final").is_dir()
    seen = [json.loads((folder / f"two/seen-{rank}.json").read_text()) for rank in (0, 1)]
    assert seen[0][0] == seen[1][0] and seen[0][0][-1][:2] == [3, 24]
    assert [line for _, _, line in seen[0][0]] == lines_of(folder / "two")
    assert (seen[0][1], seen[1][1]) == (True, False)
    fails = changed(base, folder / "failed")
    fails["train"]["callbacks"] = [{name: {"fail": 1}}]
    told = ranks.refusal(fails, ranks=2)
    assert "Told, on_step_end: " in told and "KeyError: 'nothing'. Go on with" in told
    assert (folder / "failed/checkpoint-1").is_dir()
