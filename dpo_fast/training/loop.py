"""A whole run: `train`, and one update of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from torch import Tensor

from dpo_fast.errors import Interrupted
from dpo_fast.training import data_ranks, distributed, signals
from dpo_fast.training.answering import Answering, answered, begin_answering
from dpo_fast.training.callbacks import Callback
from dpo_fast.training.calling import open_callbacks
from dpo_fast.training.carried import carry_optimizer
from dpo_fast.training.checkpoint_run import before_export
from dpo_fast.training.checkpoints import read_state
from dpo_fast.training.code_sources import sources_of_callbacks
from dpo_fast.training.config import RunConfig
from dpo_fast.training.console import progress_bar, say
from dpo_fast.training.earlier_run import MODEL, check_earlier_run
from dpo_fast.training.engine import engines_released, release
from dpo_fast.training.evaluation import evaluate_run, evaluated
from dpo_fast.training.export import export
from dpo_fast.training.finite import Place
from dpo_fast.training.first_batches import compare_at_start
from dpo_fast.training.fit import Choices, check_run
from dpo_fast.training.hub import open_repo
from dpo_fast.training.hub_saves import pushing
from dpo_fast.training.lock import check_free, sole_run
from dpo_fast.training.metrics import MetricSums
from dpo_fast.training.nonfinite import check_weights, settle
from dpo_fast.training.opening import rehearse
from dpo_fast.training.own_sampler import open_sampler
from dpo_fast.training.perf import watch_head, work_of
from dpo_fast.training.places import check_writable
from dpo_fast.training.prepare import Run, prepare
from dpo_fast.training.resume import check_fits, checkpoint_of, resume, save
from dpo_fast.training.run_log import RunLog, open_log
from dpo_fast.training.step import coupled_step, train_step

RESUME = "with train.resume_from_checkpoint=true it goes on from the last checkpoint"


def train(config: RunConfig, dry_run: bool = False) -> Path | None:
    """Train as the configuration says; returns the folder of the trained model. Collective.

    dry_run: do all that comes before the first step, and return None.

    Raises:
        UserError: before training, if something does not fit; during it, if numbers are not finite.
        Interrupted: after a signal (`signals.py`), once the step is finished and a checkpoint saved.
        Unhealthy: the same after a finding that health.stop_on names.
    """
    choices, callbacks = check_run(config), open_callbacks(config)
    open_sampler(config)
    check_free(config.train.output_dir)
    check_earlier_run(config)
    check_writable(config.train.output_dir)
    with signals.stop_at_once(f"nothing is lost; {RESUME}, or begin again"):
        data_ranks.join(config.parallel)
        with sole_run(config.train.output_dir), engines_released():
            return sole_train(config, choices, dry_run, callbacks)


def sole_train(
    config: RunConfig, choices: Choices, dry_run: bool, callbacks: Mapping[str, Callback]
) -> Path | None:
    """`train` in a folder that no other run uses."""
    distributed.from_main(lambda: check_earlier_run(config))  # it may just have ended
    checkpoint = checkpoint_of(config)
    if not dry_run:
        distributed.from_main(lambda: open_repo(config, checkpoint is not None))
    fits = None if checkpoint is None else partial(check_fits, checkpoint)
    taken = 0 if checkpoint is None else read_state(checkpoint).get("step", 0)
    run = prepare(config, choices, fits, taken)
    run.code |= sources_of_callbacks(callbacks)
    if dry_run:
        return rehearse(run, checkpoint)
    sums = MetricSums(run.engine.device, work_of(run.model))
    watch_head(run.model.causal_lm.get_output_embeddings(), sums.clock)
    with pushing(run.config, run.saver):
        with open_log(run, callbacks) as log:
            with log.clock_stopped():
                position = resume(run, checkpoint, sums, log) if checkpoint else start(run, log)
                answering = begin_answering(run, position[0], log)
            with signals.stop_signals(RESUME) as asked, run.saver:
                step = steps(run, *position, sums, log, asked, answering)
        model = Path(config.train.output_dir) / MODEL
        as_begun = before_export(run.config, run.weights, step)
        export(run.model, as_begun, model, run.best.weights(run.model.model, step))
        log.calls.end(model)
        release(run.engine, *run.references.values())
    say(f"the trained model is in {model}")
    return model


def steps(
    run: Run,
    step: int,
    to_evaluate: bool,
    sums: MetricSums,
    log: RunLog,
    asked: Callable[[], bool],
    answering: Answering | None = None,
) -> int:
    """Train from `step` to the end; returns the steps taken. Collective.

    to_evaluate: whether a signal interrupted the evaluation after `step`.
    asked: whether a signal has come to any rank.

    Raises:
        Interrupted: a signal came, and a checkpoint is saved.
        UserError: the same after an error of a callback.
    """
    train, calls, stopped = run.config.train, log.calls, False
    if to_evaluate and not evaluated(run, step, log, asked):
        raise Interrupted(f"interrupted; {RESUME}")
    if to_evaluate:
        run.best.keep(step)
        run.best.write()
    ended = run.best.exhausted
    with progress_bar("training", run.total_steps, step) as advance:
        while step < run.total_steps and not (stopped or ended or calls.error):
            rate = run.engine.get_lr()[0]  # the step moves the schedule on
            update(run, step, sums)
            calls.step_end(step + 1, run.train.examples_of(step))
            step, stopped = step + 1, asked() or bool(calls.error)
            run.saver.check()
            last = step == run.total_steps or calls.stopped
            settle(run, step, stopped or last or calls.asks)
            if calls.take("log") or due(run.config.log.logging_steps, step, last):
                log.training(step, sums.read(), rate)
            with log.clock_stopped():
                last = last or calls.stopped
                to_evaluate = calls.take("evaluate") or due(train.eval_steps, step, last)
                to_evaluate = run.eval is not None and to_evaluate
                if to_evaluate and not stopped:
                    stopped = to_evaluate = not evaluated(run, step, log, asked)
                ended = last or calls.stopped or run.best.exhausted
                stopped = stopped or not answered(answering, step, ended, log, asked)
                stopped = stopped or bool(calls.error) or (not last and log.watch.stops())
                if calls.take("save") or due(train.save_steps, step, ended or stopped):
                    check_weights(run, step)
                    folder = save(run, step, sums, to_evaluate, calls.state())
                    calls.saved(folder)
            advance(log.loss)
    if stopped or calls.error:
        calls.raise_error()
        log.watch.raise_unhealthy(folder)
        raise Interrupted(f"interrupted; resume with train.resume_from_checkpoint={folder}")
    return step


def due(every: int | None, step: int, last: bool) -> bool:
    """Whether something is due that happens every so many steps and after the last."""
    return last or (every is not None and step % every == 0)


def start(run: Run, log: RunLog) -> tuple[int, bool]:
    """Begin a new run: compare policy and reference, and evaluate once. Returns as `resume` does."""
    log.begin(0)
    if run.config.train.optimizer_from is not None:
        carry_optimizer(run.engine, run.config.train.optimizer_from)
    found = compare_at_start(run)
    log.opening(run.best.note(0, evaluate_run(run, 0)) if run.eval else None, found)
    return 0, False


def update(run: Run, step: int, sums: MetricSums) -> Tensor:
    """Take optimiser step number `step`, counted from 0. Collective.

    Returns:
        This rank's share of the loss, [] fp32.
    """
    split, number = run.train.at(step)
    sums.begin()
    indices, statistics = split.sampler.global_batch(number), run.statistics
    loss_pass, provider = run.loss_and_reference("train")
    statistics.begin_step(run.engine, split.mismatched(indices), loss_pass, provider)
    batches, totals = split.batches(number), split.totals(indices)
    arguments = (run.engine, batches, loss_pass, provider, totals, sums, statistics)
    if loss_pass.objective.coupled:
        share = coupled_step(*arguments, indices)
    else:
        share = train_step(*arguments)
    statistics.end_step()
    sums.note(statistics.values)
    sums.step(run.guard.after(Place(step, split, number)))
    if run.config.reference_spec.follows:
        run.references["train"].after_step(step + 1)
    return share
