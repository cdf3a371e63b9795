"""What a run writes while it trains: metrics.jsonl, the monitors, its configuration."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path

import yaml

from dpo_fast.models.load import DTYPES
from dpo_fast.training import distributed
from dpo_fast.training.checkpoints import writing
from dpo_fast.training.console import say
from dpo_fast.training.perf import peak_memory, product_rate
from dpo_fast.training.prepare import Run


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
            (self.folder / "data-report.json").write_text(run.train.examples.report.to_json())
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
            line["perf/examples_per_second"] = line.pop("examples") / seconds
            norm = self.run.engine.get_global_grad_norm()
            line["grad_norm"] = float(norm) if norm is not None else None
            line["perf/peak_memory_gib"] = distributed.largest(peak_memory(self.run.engine.device))
            if (flops := line.pop("flops", None)) is not None:
                line["perf/mfu"] = flops / (seconds * self.rate * distributed.world_size())
            report = self.run.train.examples.report
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
        rows = self.run.train.examples.kind.name
        rate = "" if evaluation else f"  {line['perf/examples_per_second']:.1f} {rows}/s"
        return f"{'eval ' if evaluation else ''}step {line['step']}  " + "  ".join(parts) + rate

    def close(self, model: Path) -> None:
        say(f"the trained model is in {model}")
