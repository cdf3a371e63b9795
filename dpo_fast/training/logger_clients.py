"""The loggers of log.report_to: files of our own and the clients of W&B, MLflow, trackio and Comet.

A class for each. It opens a run, or the one that it is given the identity of, and takes metrics, findings
and tables of answers. Errors are the client's own: `loggers.py` catches them.
"""

from __future__ import annotations

import contextlib
import csv
import io
import os
import re
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import yaml

from dpo_fast import durable
from dpo_fast.training.config import RunConfig
from dpo_fast.training.public import flat, public

FINISHED, KILLED, FAILED = "finished", "killed", "failed"  # how a run ends
STEP = "train/global_step"
PROJECT = "dpo_fast"
LOCAL = "; or leave it out (metrics.jsonl is always written)"


@dataclass(frozen=True)
class Answers:
    """A table of sample answers."""

    columns: list[str]
    rows: list[list[Any]]

    @property
    def markdown(self) -> str:
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(value: Any) -> str:
    told = "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    return "<br>".join(told.replace("|", "\\|").splitlines())  # at every character that ends a line


@dataclass(frozen=True)
class Opening:
    """What a logger begins with.

    step: after which the run goes on. identity: of the run that goes on; None of a new one.
    theirs: a run of the client's that the calling code has begun, as a sweep does; None: there is none.
    """

    config: RunConfig
    step: int
    identity: str | None = None
    theirs: Any = None

    @property
    def options(self) -> dict[str, Any]:
        """The resolved configuration without secrets."""
        return public(self.config.resolved())

    @property
    def name(self) -> str:
        return self.config.run_name

    @property
    def notes(self) -> str | None:
        """log.notes, without secrets too."""
        return public(self.config.log.notes)

    def project(self, variable: str) -> str:
        """log.project, or what the client's own variable says."""
        return self.config.log.project or os.environ.get(variable) or PROJECT

    def named(self, variable: str) -> str:
        """log.run_name, or what the client's own variable says."""
        return self.config.log.run_name or os.environ.get(variable) or self.name


class Logger(Protocol):
    """What receives metrics. A run that the calling code has begun gets them, and stays open.

    package: that must be there; install: what pip calls it. advice: behind an error of its beginning.
    identity: by which the service finds the run again.
    """

    package: ClassVar[str | None]
    install: ClassVar[str]
    advice: ClassVar[str]
    identity: str | None

    @staticmethod
    def running() -> Any:
        """The client's run that the calling code has begun, or None. Clients know them by thread."""

    def __init__(self, opening: Opening) -> None: ...

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def tell(self, step: int, name: str, text: str) -> None: ...

    def answers(self, step: int, answers: Answers) -> None: ...

    def close(self, status: str) -> None: ...


class TensorBoard:
    """Event files in output_dir/tensorboard."""

    package, install, advice = "tensorboard", "tensorboard", LOCAL

    @staticmethod
    def running() -> None:
        """Files have none."""

    def __init__(self, opening: Opening) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # A resumed run takes the steps after its checkpoint again, and a run that begins anew all of them.
        parts = [part for part in opening.name.split("/") if part not in ("", ".", "..")]
        folder = Path(opening.config.train.output_dir, "tensorboard", *parts)
        step, log = opening.step, opening.config.log
        self.identity = None
        self.writer = SummaryWriter(str(folder), purge_step=step + 1 if step else 0)
        if not step:
            told = {"project": log.project, "group": log.group, "tags": ", ".join(log.tags)}
            told = {
                name: value for name, value in (told | {"notes": opening.notes}).items() if value
            }
            for name, value in told.items():
                self.writer.add_text(f"run/{name}", value, 0)
            text = yaml.safe_dump(opening.options, sort_keys=False)
            self.writer.add_text("run/config", "```yaml\n" + text + "```", 0)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def tell(self, step: int, name: str, text: str) -> None:
        self.writer.add_text(f"health/{name}", text, step)

    def answers(self, step: int, answers: Answers) -> None:
        self.writer.add_text("answers", answers.markdown, step)

    def close(self, status: str) -> None:
        self.writer.close()


class WandB:
    """A run of Weights & Biases; variables of its client hold as well."""

    package, install = "wandb", "wandb"
    advice = (
        " Or set WANDB_MODE=offline, and `wandb sync` sends the run later; or leave wandb out "
        "(metrics.jsonl is always written)"
    )

    @staticmethod
    def running() -> Any:
        import wandb

        return wandb.run

    def __init__(self, opening: Opening) -> None:
        import wandb

        self.wandb, self.theirs = wandb, opening.theirs is not None
        if self.theirs:
            self.run = opening.theirs
            self.run.config.update(opening.options, allow_val_change=True)
        else:
            self.run = self._begun(opening)
        self.identity = self.run.id
        self.run.define_metric(STEP)
        self.run.define_metric("*", step_metric=STEP, step_sync=True)

    def _begun(self, opening: Opening) -> Any:
        log = opening.config.log
        return self.wandb.init(
            project=opening.project("WANDB_PROJECT"),
            name=opening.named("WANDB_NAME"),
            dir=os.environ.get("WANDB_DIR") or opening.config.train.output_dir,
            config=opening.options,
            tags=list(log.tags) or None,
            notes=opening.notes,
            group=log.group,
            **({"id": opening.identity, "resume": "allow"} if opening.identity else {}),
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.run.log({**metrics, STEP: step})

    def tell(self, step: int, name: str, text: str) -> None:
        self.run.alert(title=f"{name} at step {step}", text=text)
        self.run.summary[f"health/{name}"] = f"step {step}: {text}"

    def answers(self, step: int, answers: Answers) -> None:
        table = self.wandb.Table(columns=answers.columns, data=answers.rows)
        self.run.log({"answers": table, STEP: step})

    def close(self, status: str) -> None:
        if not self.theirs:
            self.run.finish(exit_code=0 if status == FINISHED else 1)


class MLflow:
    """A run of MLflow, in the store that its own variables name (MLFLOW_TRACKING_URI)."""

    package, install = "mlflow", "mlflow"
    advice = " Look at MLFLOW_TRACKING_URI, or leave mlflow out (metrics.jsonl is always written)"
    STATUS: ClassVar = {FINISHED: "FINISHED", KILLED: "KILLED", FAILED: "FAILED"}
    ODD, LONGEST = re.compile(r"[^\w\-./ ]"), 250  # in names, and characters of one
    MOST_METRICS, MOST_PARAMETERS, MOST_CHARACTERS = 500, 100, 500

    @staticmethod
    def running() -> Any:
        import mlflow

        return mlflow.active_run()

    def __init__(self, opening: Opening) -> None:
        import mlflow

        self.entities, self.client = mlflow.entities, mlflow.MlflowClient()
        self.theirs = opening.theirs is not None
        asked = os.environ.get("MLFLOW_RUN_ID")  # `mlflow run` begins one for its processes
        given = opening.theirs.info.run_id if self.theirs else asked
        self.identity = given or self._gone_on(opening.identity) or self._begun(opening)
        if given is not None or opening.identity != self.identity:
            self._describe(opening)

    def _key(self, name: str) -> str:
        return self.ODD.sub("_", name)[: self.LONGEST]

    def _gone_on(self, identity: str | None) -> str | None:
        """A run that is resumed, running again; None if the store has none of that identity."""
        from mlflow.exceptions import MlflowException

        if identity is not None:
            with contextlib.suppress(MlflowException):  # it was deleted, or this is another store
                self.client.update_run(identity, status="RUNNING")
                return identity
        return None

    def _begun(self, opening: Opening) -> str:
        log, known = opening.config.log, os.environ.get("MLFLOW_EXPERIMENT_ID")
        if log.project or known is None:  # mlflow.set_experiment sets it
            name = opening.project("MLFLOW_EXPERIMENT_NAME")
            experiment = self.client.get_experiment_by_name(name)
            known = experiment.experiment_id if experiment else self.client.create_experiment(name)
        return self.client.create_run(known, run_name=opening.name).info.run_id

    def _describe(self, opening: Opening) -> None:
        """Labels and configuration of a run. Parameters of a run never change, so theirs stay."""
        log = opening.config.log
        told = {"tags": ", ".join(log.tags), "group": log.group}
        for key, value in (told | {"mlflow.note.content": opening.notes}).items():
            if value:
                self.client.set_tag(self.identity, key, value)
        there = self.client.get_run(self.identity).data.params
        options = {
            self._key(key): str(value)[: self.MOST_CHARACTERS]
            for key, value in flat(opening.options)
        }
        given = [self.entities.Param(*each) for each in options.items() if each[0] not in there]
        for first in range(0, len(given), self.MOST_PARAMETERS):
            part = given[first : first + self.MOST_PARAMETERS]
            self.client.log_batch(self.identity, params=part)
        self.client.log_dict(self.identity, opening.options, "config.yaml")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        found = [
            self.entities.Metric(self._key(name), float(value), now, step)
            for name, value in metrics.items()
        ]
        for first in range(0, len(found), self.MOST_METRICS):
            self.client.log_batch(self.identity, metrics=found[first : first + self.MOST_METRICS])

    def tell(self, step: int, name: str, text: str) -> None:
        self.client.set_tag(self.identity, self._key(f"health/{name}"), f"step {step}: {text}")

    def answers(self, step: int, answers: Answers) -> None:
        # MLflow's table as JSON. One file for each step: appending to one would read it back every time.
        rows = [[step, *row] for row in answers.rows]
        table = dict(zip(("columns", "data"), (["step", *answers.columns], rows)))
        self.client.log_dict(self.identity, table, f"answers/step-{step}.json")

    def close(self, status: str) -> None:
        if not self.theirs:
            self.client.set_terminated(self.identity, self.STATUS[status])


def quiet_stdout() -> contextlib.AbstractContextManager[Any]:
    """Standard output is for what the command gives: what a client prints goes to standard error."""
    return contextlib.redirect_stdout(sys.stderr)


class Trackio:
    """A run of trackio: on this machine, or in the Space that TRACKIO_SPACE_ID names."""

    package, install, advice = "trackio", "trackio", LOCAL

    @staticmethod
    def running() -> Any:
        import trackio

        return trackio.context_vars.current_run.get()

    def __init__(self, opening: Opening) -> None:
        import trackio

        self.trackio, self.theirs = trackio, opening.theirs is not None
        labels = {"tags": list(opening.config.log.tags), "notes": opening.notes}
        options = opening.options | labels
        if self.theirs:
            self.run = opening.theirs
            self.run.config.update(options)
            self.run._config_logged = False  # it sends its configuration once, with what comes next
        else:
            self.run = self._begun(opening, options)
            # Its own end of the process would finish the run that `close` has finished.
            trackio.context_vars.current_run.set(None)
        self.identity = f"{self.run.id}/{self.run.name}"

    def _begun(self, opening: Opening, options: dict[str, Any]) -> Any:
        number, _, name = (opening.identity or "").partition("/")
        with quiet_stdout():
            run = self.trackio.init(
                project=opening.project("TRACKIO_PROJECT"),
                name=name or opening.name,
                group=opening.config.log.group,
                config=options,
                resume="allow" if name else "never",
                embed=False,
            )
        if name:  # trackio resumes the newest run of the name, and that may be another one
            run.id = number
        return run

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.run.log({**metrics, STEP: step}, step=step)

    def tell(self, step: int, name: str, text: str) -> None:
        with quiet_stdout():
            self.run.alert(title=name, text=text, step=step)

    def answers(self, step: int, answers: Answers) -> None:
        table = self.trackio.Table(columns=answers.columns, data=answers.rows)
        self.run.log({"answers": table}, step=step)

    def close(self, status: str) -> None:
        if not self.theirs:
            with quiet_stdout():
                self.run.finish()


class Comet:
    """An experiment of Comet. COMET_START_ONLINE=0 keeps it on this machine, for `comet upload`."""

    package, install = "comet_ml", "comet_ml"
    advice = (
        " Or set COMET_START_ONLINE=0, and `comet upload` sends the experiment later; or leave comet_ml "
        "out (metrics.jsonl is always written)"
    )

    @staticmethod
    def running() -> Any:
        import comet_ml

        found = comet_ml.get_running_experiment()
        return None if found is None or found.ended else found

    def __init__(self, opening: Opening) -> None:
        log, self.theirs = opening.config.log, opening.theirs is not None
        self.experiment = opening.theirs if self.theirs else self._begun(opening)
        if not self.experiment.alive:  # its client has said why, and would drop everything
            raise ConnectionError("its experiment has no connection to Comet")
        self.identity = self.experiment.get_key()
        if self.theirs:
            self.experiment.add_tags(self._tags(opening))
        if self.theirs or opening.identity is None:
            self.experiment.log_parameters(dict(flat(opening.options)))
            told = {"group": log.group, "notes": opening.notes}
            self.experiment.log_others({name: value for name, value in told.items() if value})

    def _tags(self, opening: Opening) -> list[str]:
        log = opening.config.log
        return [*log.tags, *([log.group] if log.group else [])]

    def _begun(self, opening: Opening) -> Any:
        import comet_ml

        folder = os.environ.get("COMET_OFFLINE_DIRECTORY")
        online = os.environ.get("COMET_START_ONLINE", "1").lower() not in ("0", "false", "no")
        if not online and folder is None:
            folder = str(Path(opening.config.train.output_dir, "comet").absolute())
            os.makedirs(folder, exist_ok=True)
        config = comet_ml.ExperimentConfig(
            name=opening.name,
            tags=self._tags(opening) or None,
            offline_directory=folder,
            log_code=False,
            parse_args=False,  # the command line may hold what `public` takes out
            auto_param_logging=False,
            auto_metric_logging=False,
            auto_output_logging=False,
            display_summary_level=0,
        )
        return comet_ml.start(
            project_name=opening.project("COMET_PROJECT_NAME"),
            online=online,
            experiment_key=opening.identity,
            mode="get" if opening.identity else "create",
            experiment_config=config,
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.experiment.log_metrics(dict(metrics), step=step)

    def tell(self, step: int, name: str, text: str) -> None:
        self.experiment.log_other(f"health/{name}", f"step {step}: {text}")

    def answers(self, step: int, answers: Answers) -> None:
        content = io.StringIO()
        csv.writer(content).writerows([answers.columns, *answers.rows])
        self.experiment.log_asset_data(content.getvalue(), f"answers-step-{step}.csv", step=step)

    def close(self, status: str) -> None:
        if not self.theirs:
            self.experiment.log_other("status", status)
            self.experiment.end()


class Csv:
    """output_dir/metrics.csv, a line for each step that was logged, for spreadsheets."""

    package, install, advice = None, "", ""
    FILE, FINDINGS = "metrics.csv", "health"

    @staticmethod
    def running() -> None:
        """Files have none."""

    def __init__(self, opening: Opening) -> None:
        self.identity = None
        self.file = Path(opening.config.train.output_dir) / self.FILE
        self.columns, self.rows = [STEP], []
        self.told: list[str] = []
        if opening.step and self.file.is_file():  # a killed run logged later steps, too
            with self.file.open(encoding="utf-8", newline="") as stream:
                reader = csv.DictReader(stream, restval="")
                self.columns = [*(reader.fieldnames or [STEP])]
                self.rows = [row for row in reader if _number(row.get(STEP)) <= opening.step]
        self._write()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        row = {STEP: step, **metrics}
        if self.told:
            row[self.FINDINGS] = "; ".join(self.told)
            self.told = []
        new = [name for name in row if name not in self.columns]
        self.columns += new
        if self.rows and str(self.rows[-1][STEP]) == str(step):  # an evaluation belongs to its step
            self.rows[-1] = {**self.rows[-1], **row}
            self._write()
            return
        self.rows.append(row)
        if new:
            self._write()
            return
        with self.file.open("a", encoding="utf-8", newline="") as stream:
            csv.DictWriter(stream, self.columns, restval="", lineterminator="\n").writerow(row)

    def tell(self, step: int, name: str, text: str) -> None:
        self.told.append(f"{name}: {text}")

    def answers(self, step: int, answers: Answers) -> None:
        """generations.jsonl has them; a table in a cell helps nobody."""

    def close(self, status: str) -> None:
        self._write()

    def _write(self) -> None:
        content = io.StringIO()
        writer = csv.DictWriter(content, self.columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        durable.write_file(self.file, content.getvalue())


def _number(text: str | None) -> float:
    try:
        return float(text or "inf")
    except ValueError:
        return float("inf")


CLIENTS: dict[str, type[Logger]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "mlflow": MLflow,
    "trackio": Trackio,
    "comet_ml": Comet,
    "csv": Csv,
}
