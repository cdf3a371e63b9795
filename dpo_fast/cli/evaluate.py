"""`dpo-fast evaluate`: metrics of a model or a checkpoint on any data that `train` reads."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from dpo_fast.cli.export import split
from dpo_fast.errors import UserError


def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            help="a model folder or hub id, an adapter, a checkpoint, or a run's folder",
            metavar="MODEL",
        ),
    ],
    data: Annotated[
        str | None,
        typer.Argument(
            help="a file, folder or hub id; default: the evaluation data of the model's run",
            metavar="DATA",
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="section.key=value, such as loss.type=ipo", metavar="KEY=VALUE"),
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="the model to compare with, a folder or a hub id")
    ] = None,
    config: Annotated[
        str | None, typer.Option(help="YAML file of a run, whose data options and loss are used")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="write the metrics to this JSON file")] = None,
    lm_eval: Annotated[
        str | None,
        typer.Option(
            help="tasks of the package lm-eval in place of data, such as ifeval,gsm8k",
            metavar="TASKS",
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="with --lm-eval: examples of each task; default: all")
    ] = None,
    nproc: Annotated[int, typer.Option(min=1, help="start this many local ranks")] = 1,
) -> None:
    """Metrics of a model on any data that train reads: those of the evaluation in a run.

    A checkpoint, and the model that a run exported, are compared with what they were compared with in
    training. An adapter is compared with its base model, any other model with --reference.
    """
    if lm_eval is not None or limit is not None:
        others = {"DATA": data, "--reference": reference, "--config": config}
        _evaluate_tasks(
            model, lm_eval, limit, out, others | {"--nproc": nproc if nproc > 1 else None}
        )
        return
    words = (data, *(overrides or ()))
    source, changes = split(data, overrides)
    from dpo_fast.training import distributed
    from dpo_fast.training.console import quiet

    distributed.adopt_slurm()
    quiet()
    from dpo_fast.training.evaluate_options import evaluation_of

    asked = evaluation_of(
        model, source, reference, config, changes, max(nproc, distributed.world_size())
    )
    if nproc > 1:
        _launch(nproc, model, words, {"--reference": reference, "--config": config, "--out": out})
    from dpo_fast.training.evaluate_model import evaluate_model

    found = evaluate_model(asked)
    if distributed.is_main():
        show(found, Console())
        if out is not None:
            write(found, out)
    distributed.leave_distributed()


def _evaluate_tasks(
    model: str, tasks: str | None, limit: int | None, out: Path | None, others: dict[str, object]
) -> None:
    """The metrics of tasks of lm-eval, on the terminal and in the file."""
    if tasks is None:
        raise UserError(f"--limit {limit} is of --lm-eval, which is not given; leave it out")
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise UserError(
            f"--lm-eval {tasks!r} names no task; name some, as in --lm-eval ifeval,gsm8k"
        )
    for option, value in others.items():
        if value is not None:
            raise UserError(
                f"{option} {value} is not used with --lm-eval, whose tasks have data of their own; leave "
                "out one of them"
            )
    from dpo_fast.training.console import quiet

    quiet()
    from dpo_fast.training.harness import evaluate_tasks

    found = evaluate_tasks(model, names, limit)
    table = Table("task", "metric", "value")
    for task, metrics in found.items():
        for name, value in metrics.items():
            table.add_row(task, name, f"{value:.6g}")
    Console().print(table)
    if out is not None:
        write_json({"model": model, "limit": limit, "tasks": found}, out)


def _launch(nproc: int, model: str, words: tuple, options: dict[str, object]) -> None:
    from dpo_fast.cli.launch import launch
    from dpo_fast.training import distributed

    if distributed.world_size() > 1:
        raise UserError(f"--nproc {nproc} starts ranks itself: leave it out under a launcher")
    given = [
        word for name, value in options.items() if value is not None for word in (name, str(value))
    ]
    arguments = ["evaluate", *given, "--", model, *(word for word in words if word is not None)]
    raise typer.Exit(launch(nproc, arguments))


def show(found: dict, console: Console) -> None:
    step = "" if found["step"] is None else f", step {found['step']}"
    reference = found["reference"]
    against = "of no model" if reference["path"] is None else reference["path"]
    words = (
        f"{found['model']}{step}, on {found['examples']:,} {found['kind']}",
        f"loss: {', '.join(found['loss'])}; reference: {reference['provider']}, {against}",
    )
    for line in words:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    table = Table()
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in found["metrics"].items():
        if not name.startswith("eval_perf/"):
            table.add_row(name.removeprefix("eval_"), f"{value:.6g}")
    console.print(table)


def write(found: dict, out: Path) -> None:
    """The metrics as JSON; what is no finite number is null."""
    metrics = {n: v if math.isfinite(v) else None for n, v in found["metrics"].items()}
    write_json(found | {"metrics": metrics}, out)


def write_json(content: dict, out: Path) -> None:
    from dpo_fast import durable

    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    with durable.writing(out, "The metrics stand above; name another file with --out"):
        durable.write_file(out, text)
    typer.echo(f"metrics: {out}")
