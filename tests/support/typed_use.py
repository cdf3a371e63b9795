"""Uses of the public interface, for a type checker: what it infers of them is what we promise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pandas
import torch
from torch import Tensor
from typing_extensions import assert_type

import dpo_fast
from dpo_fast import (
    Callback,
    Control,
    FusedHead,
    FusedLinearPreferenceLoss,
    LinearLogp,
    PreferenceLoss,
    PreferenceRun,
    Result,
    RunConfig,
    RunState,
    linear_logp,
    register_loss,
)
from dpo_fast.data.config import DataConfig
from dpo_fast.data.own_order import Rows
from dpo_fast.errors import UserError
from dpo_fast.generation.config import EngineSection, SampleSection
from dpo_fast.judging.config import JudgeSection, PairsSection
from dpo_fast.losses import LossOptions, PairLogps
from dpo_fast.models.config import ModelSection
from dpo_fast.models.lora_section import LoraSection
from dpo_fast.models.quantization_section import QuantizationSection
from dpo_fast.references.config import ReferenceSection
from dpo_fast.rounds.config import RoundsConfig
from dpo_fast.rounds.stages import StageSection
from dpo_fast.training.generate_section import GenerateSection
from dpo_fast.training.health_section import HealthSection
from dpo_fast.training.log_section import LogSection
from dpo_fast.training.parallel_section import ParallelSection
from dpo_fast.training.sections import LossSection, TrainSection

hidden, weight, labels = torch.randn(6, 8), torch.randn(9, 8), torch.zeros(6, dtype=torch.int64)
assert_type(linear_logp(hidden, weight, labels), LinearLogp)
assert_type(linear_logp(hidden, weight, labels).logp, Tensor)
assert_type(dpo_fast.__version__, str)
loss = FusedLinearPreferenceLoss(beta=0.1)
plain = PreferenceLoss("sigmoid", beta=0.1)
plain.beta, plain.loss_type = 0.2, ["sigmoid", "sft"]
head: type[torch.nn.Module] = FusedHead
error: ValueError = UserError("a message")

rows: list[dict[str, str]] = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
table = datasets.Dataset.from_list(rows)
stream, frame = table.to_iterable_dataset(), pandas.DataFrame(rows)


class Indexed(torch.utils.data.Dataset[dict[str, str]]):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> dict[str, str]:
        return rows[index]


class Stop(Callback):
    def on_log(self, state: RunState, control: Control) -> None:
        assert_type(state.step, int)
        assert_type(state.epoch, float | None)
        control.should_training_stop = state.is_main


def reversed_rows(rows: Rows, epoch: int) -> list[int]:
    return list(range(len(rows) - epoch, 0, -1))


run = PreferenceRun(
    "model",
    train_dataset=rows,
    output_dir="out",
    callbacks=[Stop(), "mine.py:Other"],
    sampler=reversed_rows,
)
for given in (
    Path("a.jsonl"),
    ["a.jsonl", Path("b")],
    tuple(rows),
    Indexed(),
    table,
    stream,
    frame,
):
    PreferenceRun("model", train_dataset=given, output_dir=Path("out"), callbacks=Stop)

config = RunConfig(model={"path": "a"}, data={"train": "b"}, train={"output_dir": "c"})
sections = RunConfig(
    model=ModelSection(path="a", lora=LoraSection(r=8)),
    data=DataConfig(train="b"),
    loss=LossSection(type="ipo", beta=0.2),
    reference=ReferenceSection(),
    train=TrainSection(output_dir="c", max_steps=3),
    parallel=ParallelSection(),
    log=LogSection(),
    health=HealthSection(),
    generate=GenerateSection(),
)
QuantizationSection(load_in_4bit=True), EngineSection(), SampleSection(), PairsSection()
RoundsConfig(output_dir="a", model=ModelSection(path="b"))
JudgeSection(type="reward_model", path="c")
StageSection(prompts="a.jsonl")


def smoothed(section: LossSection) -> LossSection:
    assert_type(section.beta, float)
    return section


def a_run() -> None:
    assert_type(run.config, RunConfig)
    result = run.train(resume_from_checkpoint=True)
    assert_type(result, Result)
    assert_type(result.model, Path | None)
    assert_type(result.metrics, list[dict[str, Any]])
    assert_type(run.evaluate(rows), dict[str, float])
    assert_type(run.save("folder"), Path)


@register_loss(needs_reference=False, options=("beta",))
def mine(logps: PairLogps, options: LossOptions) -> Tensor:
    return options.beta * (logps.rejected - logps.chosen)


@register_loss
def plainly(logps: PairLogps, options: LossOptions) -> Tensor:
    return logps.rejected - logps.chosen


logps = PairLogps(hidden[0], hidden[0], labels, labels)
assert_type(mine(logps, LossOptions()), Tensor)
assert_type(plainly(logps, LossOptions()), Tensor)
