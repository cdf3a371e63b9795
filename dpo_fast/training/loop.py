"""How a run ends before its time: SIGINT, SIGTERM, a loss that is not finite.

A run's checkpoints: what they hold, and what a run that goes on from one must share with it.

One update of a run: the pairs of a step, and the kind of step that its losses want.

`train`: the whole run, from a configuration to a Hugging Face folder.
"""

from __future__ import annotations

import math
import signal
import tempfile
from pathlib import Path

from torch import Tensor

from dpo_fast.data.sampler import Sampler
from dpo_fast.errors import Interrupted, UserError
from dpo_fast.references import EmaReference
from dpo_fast.training import distributed
from dpo_fast.training.checkpoints import find_checkpoint, load_checkpoint, save_checkpoint
from dpo_fast.training.config import RunConfig
from dpo_fast.training.console import progress_bar, say, track
from dpo_fast.training.export import export
from dpo_fast.training.metrics import MetricSums
from dpo_fast.training.perf import watch_head, work_of
from dpo_fast.training.prepare import Run, check, prepare
from dpo_fast.training.run_log import RunLog
from dpo_fast.training.step import check_start, coupled_step, evaluate, train_step


class StopSignals:
    """SIGINT and SIGTERM ask for an end after the step; all ranks agree on which step that is."""

    def __init__(self) -> None:
        self.asked = self.raised = False
        self.previous = {
            name: signal.signal(name, self._ask) for name in (signal.SIGINT, signal.SIGTERM)
        }

    def _ask(self, number, frame) -> None:
        if self.asked and number == signal.SIGINT:  # the second Ctrl-C means now
            raise KeyboardInterrupt
        self.asked = True

    def agree(self, finite: bool, run: Run, step: int) -> None:
        self.raised, not_finite = distributed.any_rank(self.asked, not finite)
        if not_finite:
            split, index = run.train.at(step)
            rows = split.sampler.global_batch(index)
            places = ", ".join(split.examples.where(row) for row in rows[:4])
            raise UserError(
                f"the loss of step {step + 1} is not finite; its batch begins with {places}. The last "
                "checkpoint is whole. People usually lower train.learning_rate or check the data there"
            )

    def restore(self) -> None:
        for name, handler in self.previous.items():
            signal.signal(name, handler)


# Of what DeepSpeed restores with its optimiser a new value would be ignored; the others would make
# another run of it halfway.
SAME_TRAIN = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_ratio",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
)
SAME_REFERENCE = ("provider", "mixup_alpha", "sync_steps")


def must_fit(run: Run) -> dict:
    """What a resumed run must share with the one that was interrupted, to be the same run."""
    train, tree = run.config.train, run.config.resolved()
    fits = {
        "world_size": distributed.world_size(),
        **run.train.must_fit(),
        "total_steps": run.total_steps,
        "global_batch_size": train.global_batch_size,
        "tokens_per_batch": train.tokens_per_batch,
        "seed": train.seed,
        "zero_stage": run.config.parallel.zero_stage,
    }
    fits |= {f"train.{name}": tree["train"][name] for name in SAME_TRAIN}
    fits |= {f"loss.{name}": value for name, value in tree["loss"].items()}
    fits |= {f"reference.{name}": tree["reference"][name] for name in SAME_REFERENCE}
    fits |= {"model.dtype": tree["model"]["dtype"], "model.lora": tree["model"]["lora"]}
    if train.tokens_per_batch is not None:  # what a pair takes depends on the layout
        fits["layout"] = train.layout
    return fits


def resume(run: Run, checkpoint: Path, sums: MetricSums, log: RunLog) -> int:
    """Everything as it was when the checkpoint was written, the open window of metrics included."""
    state = load_checkpoint(run.engine, checkpoint, must_fit(run), sums.values, run.stateful)
    run.train.seek(state)
    log.forget_after(state["step"])
    say(f"resumed {checkpoint} at step {state['step']}")
    return state["step"]


def save(run: Run, step: int, sums: MetricSums) -> Path:
    """A checkpoint of this step."""
    train = run.config.train
    state = {"step": step, **run.train.position(step), **must_fit(run)}
    return save_checkpoint(
        run.engine, train.output_dir, state, sums.values, train.save_total_limit, run.stateful
    )


def update(run: Run, step: int, sums: MetricSums) -> Tensor:
    """Optimiser step number `step`, counted from 0. This rank's share of the loss, [] fp32. Collective."""
    split, index = run.train.at(step)
    rows, statistics = split.sampler.global_batch(index), run.statistics
    models = run.loss_and_reference("train")
    statistics.begin_step(run.engine, split.mismatched(rows), *models)
    common = (run.engine, split.batches(index), *models, split.totals(rows), sums)
    if run.loss_pass.objective.coupled:
        share = coupled_step(*common, rows, statistics)
    else:
        share = train_step(*common, statistics)
    sums.note(statistics.values)
    statistics.end_step()
    if isinstance(reference := run.references["train"], EmaReference):
        reference.after_step(step + 1)
    return share


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
