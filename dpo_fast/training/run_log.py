"""What a run writes while it trains: config.yaml, data-report.json, metrics.jsonl, loggers."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from dpo_fast.data.facts import data_facts
from dpo_fast.durable import write_file
from dpo_fast.errors import Interrupted
from dpo_fast.health.history import NONFINITE
from dpo_fast.progress import duration
from dpo_fast.training import distributed
from dpo_fast.training.callbacks import Callback
from dpo_fast.training.calling import Calls
from dpo_fast.training.checkpoints import saving
from dpo_fast.training.console import say
from dpo_fast.training.earlier_run import METRICS, make_room
from dpo_fast.training.logger_clients import FAILED, FINISHED, KILLED
from dpo_fast.training.loggers import Guarded, answers_table, named, open_loggers
from dpo_fast.training.perf import peak_memory_gib, product_rate
from dpo_fast.training.prepare import Run
from dpo_fast.training.recorded import RUN_CONFIG, written
from dpo_fast.training.run_facts import record_start
from dpo_fast.training.start import Start
from dpo_fast.training.watch import Watch

SHOWN = ("loss", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected")


def open_log(run: Run, callbacks: Mapping[str, Callback] = MappingProxyType({})) -> RunLog:
    """Measure the device for perf/mfu. Nothing is written before `RunLog.begin`."""
    rate = product_rate(run.engine.device, run.config.model.torch_dtype)
    file = Path(run.config.train.output_dir) / METRICS
    return RunLog(run, file, rate, Calls(run, callbacks))


class RunLog:
    """metrics.jsonl, the loggers, and a line on the terminal. Rank 0 writes; every rank must call.

    rate: operations in a second that one device can do.
    calls: the callbacks, which are told of every line.
    loss: the latest in words, for the progress bar.
    """

    def __init__(self, run: Run, file: Path, rate: float, calls: Calls) -> None:
        self.run, self.file, self.rate, self.calls = run, file, rate, calls
        self.loss = ""
        self.loggers: list[Guarded] = []
        self.watch = Watch(run.config)
        self._since = time.monotonic()  # when the window of the rates began
        self._logged = 0  # the step after which it began

    def begin(self, step: int, resumed: bool = False) -> None:
        """Before the first line of a run that goes on after `step`: write what it is, and open the loggers.

        Unless the run is resumed, what an earlier run left in its folder makes room. A resumption that is
        refused does not come here, so the folder is as it was.

        Raises:
            UserError: the folder cannot be written.
        """
        self._logged = step
        if distributed.is_main():
            self._write_files(resumed)
            self._forget_after(step)
            lengths = self.run.train.examples.lengths
            record_start(self.file.parent, step, lengths, made_of(self.run))
            if self.file.is_file():
                self.watch.resume(self.file)
            self.loggers = open_loggers(self.run.config, step, resumed)
        self.calls.begin(step)

    def _write_files(self, resumed: bool) -> None:
        """The resolved configuration and the data report."""
        folder = self.file.parent
        with saving(folder / RUN_CONFIG):
            folder.mkdir(parents=True, exist_ok=True)
            write_file(folder / RUN_CONFIG, written(self.run.config))
            write_file(folder / "data-report.json", self.run.train.examples.report.to_json())
            if not resumed:
                make_room(folder)

    def close(self, status: str = FINISHED) -> None:
        """After the last line. The second call does nothing."""
        for logger in self.loggers:
            logger.close(status)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        stopped = kind is not None and issubclass(kind, (Interrupted, KeyboardInterrupt))
        self.close(FINISHED if kind is None else KILLED if stopped else FAILED)

    def training(self, step: int, metrics: dict[str, float], learning_rate: float) -> None:
        """Log training metrics, with rates and the learning rate of the step. Collective."""
        line, engine, seconds = dict(metrics), self.run.engine, time.monotonic() - self._since
        line["perf/tokens_per_second"] = line["num_tokens"] / seconds
        line["perf/examples_per_second"] = line.pop("examples") / seconds
        norm = engine.get_global_grad_norm()
        line["grad_norm"] = float(norm) if norm is not None else None
        line["nonfinite_steps"] = self.run.guard.count
        line["perf/peak_memory_gib"] = distributed.largest(peak_memory_gib(engine.device))
        if (flops := line.pop("flops", None)) is not None:
            line["perf/mfu"] = flops / (seconds * self.rate * distributed.world_size())
        report = self.run.train.examples.report
        line["data/truncated"] = report.prompts_cut + report.answers_cut
        line["data/dropped"] = report.dropped.total + report.bad.total
        line["learning_rate"] = learning_rate
        self.loss = " ".join(_brief(line))
        left = seconds / max(step - self._logged, 1) * (self.run.total_steps - step)
        self._logged = step
        self._since = time.monotonic()
        self._write(step, line)
        rate = f"{line['perf/examples_per_second']:.1f} {self.run.train.examples.kind.name}/s"
        rate += f"  {line['perf/tokens_per_second']:,.0f} tokens/s  {duration(left)} left"
        say(f"step {step} of {self.run.total_steps}  {_shown(line)}  {rate}")

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """Log metrics of the evaluation split, whose names begin with `eval_`."""
        self._write(step, metrics)
        say(f"eval step {step}  {_shown(metrics, 'eval_')}")
        self.calls.evaluated()

    def generated(
        self, step: int, metrics: dict[str, float], answers: Sequence[dict[str, Any]] = ()
    ) -> None:
        """Log metrics of answers to held-out prompts, whose names begin with `eval_generate/`.

        answers: as generations.jsonl has them; with log.log_completions the loggers get them.
        """
        self._write(step, metrics)
        if self.run.config.log.log_completions:
            for logger in self.loggers:
                logger.answers(step, answers_table(answers))
        say(f"answers step {step}  {told_answers(metrics)}")

    def opening(self, evaluated: dict[str, float] | None, found: Start | None) -> None:
        """Log step 0: the first evaluation, what `check_start` found, and what is measured once."""
        metrics = (evaluated or {}) | ({} if found is None else found.metrics)
        if distributed.is_main():
            run = self.run
            facts = data_facts(run.train.examples, None if run.eval is None else run.eval.examples)
            metrics |= {f"data/{name}": value for name, value in facts.items()}
            metrics |= {"total_steps": run.total_steps}
        self._write(0, metrics)
        if evaluated is not None:
            say(f"eval step 0  {_shown(evaluated, 'eval_')}")
            self.calls.evaluated()

    @contextlib.contextmanager
    def clock_stopped(self) -> Iterator[None]:
        """What is done inside does not count in the rates."""
        begin = time.monotonic()
        yield
        self._since += time.monotonic() - begin

    def _forget_after(self, step: int) -> None:
        """Drop lines of later steps: a killed run logged them, and a resumed run takes them again."""
        if self.file.is_file():
            lines = self.file.read_text(errors="replace").splitlines()
            kept = [line for line in lines if (of := step_of_line(line)) is not None and of <= step]
            with saving(self.file):
                write_file(self.file, "".join(f"{line}\n" for line in kept))

    def _write(self, step: int, metrics: dict[str, Any]) -> None:
        """Write a line and tell the callbacks of it. Collective."""
        self.calls.logged(step, self._line(step, metrics) if distributed.is_main() else {})

    def _line(self, step: int, metrics: dict[str, Any]) -> dict[str, Any]:
        """Write a line of metrics.jsonl, and give it to the loggers; returns it."""
        epochs = self.run.train.epochs(step)
        place = {"step": step} if epochs is None else {"step": step, "epoch": round(epochs, 6)}
        metrics = metrics | self.watch.look(place | metrics, self.loggers)
        line = finite_line(place | metrics)
        with saving(self.file), self.file.open("a") as stream:
            stream.write(json.dumps(line, allow_nan=False) + "\n")
        values = named({n: v for n, v in line.items() if n not in ("step", NONFINITE)})
        for logger in self.loggers:
            logger.log(step, values)
        return line


def made_of(run: Run) -> dict[str, Any]:
    """Hashes of what a run is made of: rows of each split, weights by the option that names them."""
    splits = {"train": run.train} | ({} if run.eval is None else {"eval": run.eval})
    rows = {
        name: {"rows": len(split.examples), "sha256": split.must_fit().get("data")}
        for name, split in splits.items()
    }
    return {"data": rows, "weights": dict(run.weights)}


def step_of_line(line: str) -> float | None:
    """The step of a line of metrics.jsonl; None of one that a crash has torn or a disk damaged."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    return step if isinstance(step, (int, float)) else None


def finite_line(values: dict[str, Any]) -> dict[str, Any]:
    """A line that is JSON, which knows no NaN and no infinity.

    They are null, and the entry `nonfinite` says by name what they were: nan, inf or -inf.
    """
    odd = {n: str(v) for n, v in values.items() if isinstance(v, float) and not math.isfinite(v)}
    return values | dict.fromkeys(odd) | ({NONFINITE: odd} if odd else {})


def told_answers(metrics: dict[str, float]) -> str:
    """The metrics of greedy answers that the terminal shows."""
    values = {name.partition("/")[2]: value for name, value in metrics.items()}
    parts = [f"{values['tokens']:.1f} tokens"] if "tokens" in values else []
    parts += [f"score {values['score']:.4g}"] if "score" in values else []
    for name, words in (("start", "the start"), ("chosen", "the chosen answers")):
        rate, low, high = (values.get(f"win_rate_{name}{end}") for end in ("", "_low", "_high"))
        if rate is not None:
            parts.append(f"{rate:.0%} wins against {words} ({low:.0%} to {high:.0%})")
    return "  ".join(parts)


def _brief(line: dict[str, Any]) -> Iterator[str]:
    """What the progress bar shows beside itself."""
    names = {"loss": "loss", "rewards/accuracies": "acc", "rewards/margins": "margin"}
    for name, short in names.items():
        if line.get(name) is not None:
            yield f"{short} {round(line[name], 3) + 0.0:.3f}"
    yield f"{line['perf/tokens_per_second']:,.0f} tok/s"


def _shown(line: dict[str, Any], prefix: str = "") -> str:
    """The metrics that the terminal shows, those that are there."""
    shown = {name: line[prefix + name] for name in SHOWN if prefix + name in line}
    # Rounded first, and 0 added: a margin of -1e-9 is no -0.0000.
    return "  ".join(f"{name} {round(value, 4) + 0.0:.4f}" for name, value in shown.items())
