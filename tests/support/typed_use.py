"""Uses of the public interface, for a type checker: what it infers of them is what we promise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
from dpo_fast.data.own_order import Rows
from dpo_fast.errors import UserError
from dpo_fast.losses import LossOptions, PairLogps

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
