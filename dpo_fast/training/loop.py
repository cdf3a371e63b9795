"""`train`: the whole run, from a configuration to a Hugging Face folder."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import tempfile
import time
from pathlib import Path

import yaml

from dpo_fast.data.sampler import Sampler
from dpo_fast.errors import Interrupted, UserError
from dpo_fast.models.load import DTYPES
from dpo_fast.training import distributed
from dpo_fast.training.checkpoints import (
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
    writing,
)
from dpo_fast.training.clock import peak_memory, watch_head
from dpo_fast.training.config import RunConfig
from dpo_fast.training.evaluate import evaluate
from dpo_fast.training.export import export
from dpo_fast.training.health import check_start
from dpo_fast.training.metrics import MetricSums
from dpo_fast.training.prepare import Run, check, prepare
from dpo_fast.training.progress import progress_bar, say, track
from dpo_fast.training.update import update
from dpo_fast.training.work import product_rate, work_of


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
            run.engine, next(split.batches(index)), *run.models("train"), split.totals(rows),
            run.config.model.dtype,
        )  # fmt: skip
        say(f"step 0: loss {loss:.7f}, expected {expected:.7f} where policy = reference")
    if run.eval:
        log.write(0, evaluate_run(run))
    return 0


# Of what DeepSpeed restores with its optimiser a new value would be ignored; the others would make
# another run of it halfway.
SAME_TRAIN = (
    "learning_rate", "lr_scheduler_type", "warmup_ratio", "weight_decay", "adam_beta1", "adam_beta2",
    "adam_epsilon", "max_grad_norm",
)  # fmt: skip
SAME_REFERENCE = ("provider", "mixup_alpha", "sync_steps")


def must_fit(run: Run) -> dict:
    """What a resumed run must share with the one that was interrupted, to be the same run."""
    train, tree = run.config.train, run.config.resolved()
    fits = {
        "world_size": distributed.world_size(),
        **run.train.must_fit(),
        "total_steps": run.total_steps,
        "global_pairs": train.global_pairs,
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


def evaluate_run(run: Run) -> dict[str, float]:
    """Metrics of the whole evaluation split."""
    split = run.eval
    sampler: Sampler = split.sampler
    rows = list(range(len(split.pairs)))
    models = run.models("eval")
    statistics = run.statistics.estimate(run.engine, split.mismatched(rows), *models)
    return evaluate(
        run.engine, track(split.all_batches(), "evaluating", sampler.steps_per_epoch),
        *models, split.totals(rows), statistics,
    )  # fmt: skip


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
            places = ", ".join(split.pairs.where(row) for row in rows[:4])
            raise UserError(
                f"the loss of step {step + 1} is not finite; its batch begins with {places}. The last "
                "checkpoint is whole. People usually lower train.learning_rate or check the data there"
            )

    def restore(self) -> None:
        for name, handler in self.previous.items():
            signal.signal(name, handler)


class RunLog:
    """metrics.jsonl, the monitors of DeepSpeed, the resolved configuration. Rank 0 writes."""

    def __init__(self, run: Run, resumed: bool) -> None:
        self.run, self.since = run, time.monotonic()
        self.folder = Path(run.config.train.output_dir)
        self.main = distributed.is_main()
        self.loss = ""  # the latest, for the progress bar
        self.rate = product_rate(run.engine.device, DTYPES[run.config.model.dtype])
        if not self.main:
            return
        resolved = yaml.safe_dump(run.config.resolved(), sort_keys=False)
        self.folder.mkdir(parents=True, exist_ok=True)
        with writing(self.folder / "config.yaml"):
            (self.folder / "config.yaml").write_text(resolved)
            (self.folder / "data-report.json").write_text(run.train.pairs.report.to_json())
        if not resumed:
            (self.folder / "metrics.jsonl").unlink(missing_ok=True)

    def write(self, step: int, metrics: dict[str, float]) -> dict[str, float]:
        """One line: rates and the schedule's state are added to training metrics."""
        evaluation = any(name.startswith("eval_") for name in metrics)
        epochs = self.run.train.epochs(step)
        line = {"step": step, **({} if epochs is None else {"epoch": round(epochs, 6)}), **metrics}
        if not evaluation:
            seconds = time.monotonic() - self.since
            line["perf/tokens_per_second"] = metrics["num_tokens"] / seconds
            line["perf/pairs_per_second"] = line.pop("pairs") / seconds
            norm = self.run.engine.get_global_grad_norm()
            line["grad_norm"] = float(norm) if norm is not None else None
            line["perf/peak_memory_gib"] = distributed.largest(peak_memory(self.run.engine.device))
            if (flops := line.pop("flops", None)) is not None:
                line["perf/mfu"] = flops / (seconds * self.rate * distributed.world_size())
            report = self.run.train.pairs.report
            line["data/truncated"] = report.prompts_cut + report.answers_cut
            line["data/dropped"] = report.dropped.total + report.bad.total
            self.loss = f"loss {metrics['loss']:.4f}"
            line["learning_rate"] = self.run.engine.get_lr()[0]
            self.since = time.monotonic()
        if self.main:
            file = self.folder / "metrics.jsonl"
            with writing(file), file.open("a") as stream:
                stream.write(json.dumps(line) + "\n")
            names = [n for n, v in line.items() if n != "step" and v is not None]
            if self.run.engine.monitor.enabled:
                self.run.engine.monitor.write_events(
                    [(f"Train/{name}", line[name], step) for name in names]
                )
        say(self._sentence(line, evaluation))
        return line

    def forget_after(self, step: int) -> None:
        """Drop lines of steps that a resumed run takes again: a killed run had written them."""
        file = self.folder / "metrics.jsonl"
        if self.main and file.is_file():
            lines = file.read_text().splitlines()
            kept = [
                line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step
            ]
            aside = file.with_suffix(".partial")
            aside.write_text("".join(f"{line}\n" for line in kept))
            aside.rename(file)

    @contextlib.contextmanager
    def clock_stopped(self):
        """What is done inside does not count in the rates."""
        begin = time.monotonic()
        yield
        self.since += time.monotonic() - begin

    def _sentence(self, line: dict, evaluation: bool) -> str:
        prefix = "eval_" if evaluation else ""
        shown = ("loss", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected")
        parts = [f"{name} {line[prefix + name]:.4f}" for name in shown if prefix + name in line]
        rows = self.run.train.pairs.kind.name
        rate = "" if evaluation else f"  {line['perf/pairs_per_second']:.1f} {rows}/s"
        return f"{'eval ' if evaluation else ''}step {line['step']}  " + "  ".join(parts) + rate

    def close(self, model: Path) -> None:
        say(f"the trained model is in {model}")
