"""Callbacks of transformers in runs of ours: called as from its Trainer, or refused by name."""

import pytest

pytest.importorskip("deepspeed")

from transformers import EarlyStoppingCallback, ProgressCallback, TrainerCallback
from transformers.trainer_callback import ExportableState

from dpo_fast.errors import UserError
from dpo_fast.training.calling import open_callbacks
from dpo_fast.training.config import build_config
from dpo_fast.training.own_code import given
from dpo_fast.training.trainer_callback import OfTransformers
from tests.support.here import train
from tests.support.metrics import lines_of
from tests.support.models import changed, run_tree, write_model, write_pairs


class Theirs(TrainerCallback, ExportableState):
    """As people write them for transformers."""

    def __init__(self, stop: int = 99) -> None:
        self.stop, self.calls = stop, []

    def state(self) -> dict:
        return {"args": {"stop": self.stop}, "attributes": {"calls": self.calls}}

    def on_train_begin(self, args, state, control, **kwargs):
        assert args.learning_rate == 1e-3 and args.output_dir and state.max_steps == 4
        self.calls.append("begin")

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.calls.append(["epoch", state.epoch])

    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_save = True
        self.calls.append(["ended", state.epoch])

    def on_step_end(self, args, state, control, model=None, processing_class=None, **kwargs):
        assert model.config.model_type == "llama" and processing_class("a")["input_ids"]
        self.calls.append(["step", state.global_step])
        if state.global_step == self.stop:
            control.should_training_stop = True
        return control

    def on_log(self, args, state, control, logs=None, **kwargs):
        assert state.is_world_process_zero and state.log_history[-1]["step"] == state.global_step
        if "loss" in logs:
            self.calls.append(["loss", logs["loss"]])

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.calls.append(["eval", metrics["eval_loss"]])

    def on_train_end(self, args, state, control, **kwargs):
        self.calls.append("end")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("theirs")
    write_model(folder / "model")
    write_pairs(folder / "pairs.jsonl", 20)
    return folder


def config(folder, **options):
    tree = changed(run_tree(folder, max_steps=4, **options), folder / "run", data={"eval_rows": 4})
    tree["train"]["callbacks"] = ["one"]
    return build_config(tree, "case")


def test_it_is_called_as_from_its_trainer_and_goes_on(folder):
    first = Theirs(stop=3)
    with given({"one": first}):
        train(config(folder))
    losses = [line["loss"] for line in lines_of(folder / "run") if "loss" in line]
    evals = [line["eval_loss"] for line in lines_of(folder / "run") if "eval_loss" in line]
    assert first.calls == [
        *["begin", ["epoch", 0.0], ["eval", evals[0]]],
        *[["step", 1], ["loss", losses[0]], ["step", 2], ["ended", 1.0], ["epoch", 1.0]],
        *[["loss", losses[1]], ["step", 3], ["loss", losses[2]], ["eval", evals[1]], "end"],
    ]
    assert (folder / "run/checkpoint-2").is_dir() and (folder / "run/checkpoint-3").is_dir()
    with given({"one": Theirs()}):
        found = open_callbacks(config(folder))
        train(config(folder, resume_from_checkpoint=True))
    assert [line["step"] for line in lines_of(folder / "run") if "loss" in line] == [1, 2, 3, 4]
    (mine,) = found.values()
    state = {"history": [{"step": 1}], "state": {"args": {"stop": 7}, "attributes": {"calls": [1]}}}
    mine.load_state_dict(state)
    assert mine.theirs.stop == 7 and mine.state_dict() == state


class EverySubstep(TrainerCallback):
    def on_substep_end(self, args, state, control, **kwargs):
        pass


class AsksForMore(TrainerCallback):
    def on_train_begin(self, args, state, control, **kwargs):
        args.gradient_accumulation_plugin.more()


class EndsEpochs(TrainerCallback):
    def on_train_begin(self, args, state, control, **kwargs):
        control.should_epoch_stop = True


def of_integrations():
    from transformers.integrations import TensorBoardCallback

    return TensorBoardCallback.__new__(TensorBoardCallback)


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: EarlyStoppingCallback(3, 0.1),
            "train.early_stopping_patience=3 and train.early_stopping_threshold=0.1 instead",
        ),
        (ProgressCallback, "is ProgressCallback of transformers: a run shows its progress itself"),
        (of_integrations, "TensorBoardCallback of transformers: name the logger in log.report_to"),
        (EverySubstep, "train.callbacks=one has on_substep_end, which a run of ours does not call"),
    ],
)
def test_what_cannot_be_honoured_is_refused(folder, make, message):
    with given({"one": make()}), pytest.raises(UserError, match=message):
        open_callbacks(config(folder))


@pytest.mark.parametrize(
    "kind, message",
    [
        (
            AsksForMore,
            "test_trainer_callback.py, line .*args.gradient_accumulation_plugin is no opt",
        ),
        (EndsEpochs, r"should_epoch_stop\), which a run of ours does not cut short"),
    ],
)
def test_what_it_asks_for_in_vain_is_told(folder, kind, message):
    with given({"one": kind()}), pytest.raises(UserError, match=message):
        train(config(folder, overwrite_output_dir=True))


def test_an_attribute_that_is_called_state_is_the_callbacks_own():
    class Counts(TrainerCallback):
        def __init__(self) -> None:
            self.state = {"steps": 3}

    assert OfTransformers(Counts(), None).state_dict() == {"history": []}
    assert "state" in OfTransformers(Theirs(), None).state_dict()
