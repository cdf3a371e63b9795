"""`dpo-fast push`: a model's folder to the Hugging Face hub."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def push(
    folder: Annotated[
        Path, typer.Argument(help="a model's folder, such as final/ of a run, or the run's")
    ],
    repo: Annotated[
        str | None,
        typer.Argument(help="name or owner/name; default: the name of the run", metavar="REPO"),
    ] = None,
    private: Annotated[
        bool | None,
        typer.Option(
            "--private/--public", help="of a new repository; default: as your settings say"
        ),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="a branch, made if there is none; default: the main one")
    ] = None,
) -> None:
    """Upload a model or an adapter with its card to the Hugging Face hub.

    The token is HF_TOKEN or that of `hf auth login`. A push that fails changes nothing here.
    """
    from dpo_fast.report.card import illustrate
    from dpo_fast.training.console import quiet
    from dpo_fast.training.earlier_run import METRICS, MODEL
    from dpo_fast.training.hub import push as push_folder

    quiet()
    if (folder / METRICS).is_file() and (folder / MODEL).is_dir():
        folder = folder / MODEL
    if folder.name == MODEL and (folder.parent / METRICS).is_file():
        illustrate(folder.parent)
    typer.echo(push_folder(folder, repo, private, revision))


def push_the_end(run, model: Path) -> None:
    """The model of a run that is over to the hub. The run is complete even where that fails. Collective.

    run: its RunConfig.
    """
    from dpo_fast.api.ending import push_the_end as push_model

    push_model(run, model, typer.echo, fail)


def fail(reason: str) -> None:
    """What did not go well after a run that is complete."""
    print(f"dpo-fast: {reason}", file=sys.stderr)
