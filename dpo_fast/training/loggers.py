"""Loggers beside metrics.jsonl. Each gets our metrics at our steps, from rank 0 alone.

Metrics have the names that the Trainer of transformers gives them: `train/loss`, `eval/loss`. DeepSpeed's
monitors stay off. They log a series of their own at other steps, after which W&B drops ours.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from dpo_fast import durable
from dpo_fast.errors import UserError
from dpo_fast.training.config import RunConfig

EVALUATION = "eval_"
STEP = "train/global_step"


class Logger(Protocol):
    """What receives metrics."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def tell(self, step: int, name: str, text: str) -> None:
        """A finding, in words."""

    def close(self) -> None: ...


class TensorBoard:
    """Event files in output_dir/tensorboard."""

    def __init__(self, config: RunConfig, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # A resumed run takes the steps after its checkpoint again, and a run that begins anew all of them.
        parts = [part for part in config.run_name.split("/") if part not in ("", ".", "..")]
        folder = Path(config.train.output_dir, "tensorboard", *parts)
        self.writer = SummaryWriter(str(folder), purge_step=step + 1 if step else 0)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def tell(self, step: int, name: str, text: str) -> None:
        self.writer.add_text(f"health/{name}", text, step)

    def close(self) -> None:
        self.writer.close()


class WandB:
    """A run of Weights & Biases.

    Its project is `WANDB_PROJECT`, by default `dpo_fast`; other variables of its client hold as well. A
    resumed run is a new one of the same name.
    """

    def __init__(self, config: RunConfig, step: int) -> None:
        import wandb

        try:
            self.run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "dpo_fast"),
                name=config.run_name,
                dir=config.train.output_dir,
                config=config.resolved(),
            )
        except wandb.Error as error:
            raise UserError(
                f"log.report_to=wandb: {durable.first_line(error)} Or set WANDB_MODE=offline, and "
                "`wandb sync` sends the run later; or leave wandb out (metrics.jsonl is always written)"
            ) from error
        self.run.define_metric(STEP)
        self.run.define_metric("*", step_metric=STEP, step_sync=True)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.run.log({**metrics, STEP: step})

    def tell(self, step: int, name: str, text: str) -> None:
        self.run.alert(title=f"{name} at step {step}", text=text)

    def close(self) -> None:
        self.run.finish()


LOGGERS: dict[str, type[Logger]] = {"tensorboard": TensorBoard, "wandb": WandB}


def check_loggers(config: RunConfig) -> None:
    """Raises UserError if the package of a logger is missing."""
    for package in config.log.report_to:
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"log.report_to={package}: the package is not installed; pip install {package}, or "
                "leave it out (metrics.jsonl is always written)"
            )


def open_loggers(config: RunConfig, step: int) -> list[Logger]:
    """The loggers of log.report_to. step: after which the run goes on."""
    return [LOGGERS[name](config, step) for name in config.log.report_to]


def named(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among the metrics, under the names of transformers."""
    names = {
        name: f"eval/{name.removeprefix(EVALUATION)}"
        if name.startswith(EVALUATION)
        else f"train/{name}"
        for name in metrics
    }
    numbers = {name: v for name, v in metrics.items() if isinstance(v, (int, float))}
    return {names[name]: value for name, value in numbers.items()}
