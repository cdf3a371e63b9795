"""`train`: the whole run, from a configuration to a Hugging Face folder."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

from dpo_fast.data.sampler import Sampler
from dpo_fast.errors import Interrupted, UserError
from dpo_fast.training import distributed
from dpo_fast.training.checkpoints import find_checkpoint
from dpo_fast.training.clock import watch_head
from dpo_fast.training.config import RunConfig
from dpo_fast.training.evaluate import evaluate
from dpo_fast.training.export import export
from dpo_fast.training.health import check_start
from dpo_fast.training.metrics import MetricSums
from dpo_fast.training.prepare import Run, check, prepare
from dpo_fast.training.progress import progress_bar, say, track
from dpo_fast.training.resume import resume, save
from dpo_fast.training.run_log import RunLog
from dpo_fast.training.stop import StopSignals
from dpo_fast.training.update import update
from dpo_fast.training.work import work_of


def train(config: RunConfig) -> Path:
    """Train as the configuration says; returns the folder of the trained model. Collective.

    Raises:
        UserError: before training, if something does not fit; during it, if the loss is not finite.
        Interrupted: after SIGINT or SIGTERM, once the step is finished and a checkpoint saved.
    """
    check(config)
    check_writable(config.train.output_dir)
    distributed.init_distributed(config.parallel.timeout_minutes)
    checkpoint = find_checkpoint(config.train.resume_from_checkpoint, config.train.output_dir)
    run = prepare(config)
    log = RunLog(run, resumed=checkpoint is not None)
    with log.clock_stopped():
        sums = MetricSums(run.engine.device, work_of(run.model))
        watch_head(run.model.causal_lm.get_output_embeddings(), sums.clock)
        step = resume(run, checkpoint, sums, log) if checkpoint else start(run, log)
    stop = StopSignals()
    with progress_bar("training", run.total_steps, step) as advance:
        while step < run.total_steps and not stop.raised:
            share = update(run, step, sums)
            stop.agree(finite=math.isfinite(share.item()), run=run, step=step)
            step += 1
            sums.step()
            last = step == run.total_steps
            if due(config.log.logging_steps, step, last):
                log.write(step, sums.read())
            with log.clock_stopped():
                if run.eval and due(config.train.eval_steps, step, last):
                    log.write(step, evaluate_run(run))
                if due(config.train.save_steps, step, last or stop.raised):
                    folder = save(run, step, sums)
            advance(log.loss)
    stop.restore()
    if step < run.total_steps:
        raise Interrupted(folder)
    model = Path(config.train.output_dir) / "final"
    export(run.model, run.tokenizer, model, config.model, config.train.merge_lora)
    log.close(model)
    return model


def check_writable(output_dir: str) -> None:
    """Raises UserError unless the run can be written there. Makes nothing: the data may be bad."""
    folder = Path(output_dir)
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise UserError(
            f"train.output_dir={output_dir} cannot be written: {error.strerror or error}; name another "
            "folder"
        ) from None


def due(every: int | None, step: int, last: bool) -> bool:
    """Whether something that is done every so many steps, and after the last, is due."""
    return last or (every is not None and step % every == 0)


def start(run: Run, log: RunLog) -> int:
    """A new run: the check against ln 2, and the first evaluation."""
    compares = run.config.reference_provider not in ("none", "columns")
    if run.loss_pass.objective.needs_reference and compares and run.config.reference.path is None:
        split, index = run.train.at(0)
        rows = [
            row
            for rank in range(distributed.world_size())
            for row in split.sampler.micro_batches(index, rank)[0]
        ]
        loss, expected = check_start(
            run.engine,
            next(split.batches(index)),
            *run.loss_and_reference("train"),
            split.totals(rows),
            run.config.model.dtype,
        )
        say(f"step 0: loss {loss:.7f}, expected {expected:.7f} where policy = reference")
    if run.eval:
        log.write(0, evaluate_run(run))
    return 0


def evaluate_run(run: Run) -> dict[str, float]:
    """Metrics of the whole evaluation split."""
    split = run.eval
    sampler: Sampler = split.sampler
    rows = list(range(len(split.examples)))
    models = run.loss_and_reference("eval")
    statistics = run.statistics.estimate(run.engine, split.mismatched(rows), *models)
    return evaluate(
        run.engine,
        track(split.all_batches(), "evaluating", sampler.steps_per_epoch),
        *models,
        split.totals(rows),
        statistics,
    )
