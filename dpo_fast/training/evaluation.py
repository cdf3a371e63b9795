"""An evaluation of a run: its metrics, and what it made of every example."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from dpo_fast.training import signals
from dpo_fast.training.console import say, track
from dpo_fast.training.eval_examples import EvalTable, record_examples
from dpo_fast.training.finite import some
from dpo_fast.training.prepare import Run
from dpo_fast.training.run_log import RunLog
from dpo_fast.training.splits import Split
from dpo_fast.training.step import evaluate


def evaluated(run: Run, step: int, log: RunLog, asked: Callable[[], bool]) -> bool:
    """Evaluate after `step` steps and log it. False, and nothing logged, if a signal came. Collective."""
    try:
        log.evaluation(step, run.best.note(step, evaluate_run(run, step, asked)))
    except signals.StopAsked:
        return False
    finally:
        run.engine.train()
    return True


def evaluate_run(run: Run, step: int, asked: Callable[[], bool] | None = None) -> dict[str, float]:
    """Metrics of the whole evaluation split after `step`; its examples go to a file. Collective.

    asked: whether a signal has come to any rank. Raises StopAsked between two batches then.
    """
    split, indices = run.eval, list(range(len(run.eval.examples)))
    loss_pass, provider = run.loss_and_reference("eval")
    mismatched = signals.until(asked, split.mismatched(indices))
    statistics = run.statistics.estimate(run.engine, mismatched, loss_pass, provider)
    batches = track(split.all_batches(), "evaluating", split.sampler.steps_per_epoch)
    batches = signals.until(asked, batches)
    table, totals = EvalTable(len(indices), run.engine.device), split.totals(indices)
    found = evaluate(run.engine, batches, loss_pass, provider, totals, statistics, table)
    if not math.isfinite(found["eval_loss"]):
        tell_not_finite(table, split, step, found["eval_loss"])
    folder, texts = Path(run.config.train.output_dir), run.config.log.eval_texts
    record_examples(table, split, run.tokenizer, folder, step, texts)
    return found


def tell_not_finite(table: EvalTable, split: Split, step: int, loss: float) -> None:
    """A line with the examples whose rewards are not finite. The weights are. Collective."""
    rewards, _, answers = table.read().unbind(1)
    odd = ((answers > 0) & ~rewards.isfinite()).any(0).nonzero().flatten().tolist()
    where = f": {some([split.examples.where(index) for index in odd])}" if odd else ""
    say(
        f"eval step {step}: the loss is {loss:g}; the rewards of {len(odd)} of {rewards.shape[1]} "
        f"{split.examples.kind.name} are not finite{where}"
    )
