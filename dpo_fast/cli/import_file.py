"""`dpo-fast import`: the configuration of another trainer as ours, and what of it has no counterpart."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dpo_fast.cli.later import import_when_used
from dpo_fast.errors import UserError
from dpo_fast.wording import printable

TRAINERS = "trl, llamafactory, openrlhf or axolotl"


def import_file(
    trainer: Annotated[str, typer.Argument(help=TRAINERS, metavar="TRAINER")],
    file: Annotated[
        Path,
        typer.Argument(
            help="its configuration, YAML or JSON, or the script that starts it", metavar="FILE"
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="write to this file; default: to the terminal")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            help="dpo, kto, cpo, orpo, ... where the file does not say which trainer it is for",
        ),
    ] = None,
    accelerate: Annotated[
        Path | None, typer.Option(help="configuration of accelerate that it is started with")
    ] = None,
    nproc: Annotated[
        int | None,
        typer.Option(
            min=1, help="GPUs that it is started on, of which the batch size is a product"
        ),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="exit with 2 if anything has no counterpart")
    ] = False,
) -> None:
    """Turn the configuration of TRL, LLaMA-Factory, OpenRLHF or Axolotl into ours.

    Every option of the file is carried over, needs nothing here, or is listed as without a counterpart.
    Defaults of theirs that differ from ours are written out.
    """
    import_when_used("torch")
    from dpo_fast.migration.draft import LOST
    from dpo_fast.migration.importers import check, lost
    from dpo_fast.migration.importers import import_file as made_of
    from dpo_fast.migration.yaml_file import text_of

    draft = made_of(trainer, file, method, accelerate, nproc)
    text = text_of(draft, str(out or "run.yaml"))
    if out is None:
        typer.echo(text, nl=False)
    else:
        _write(out, text)
    for fate in draft.fates:
        if fate.what == LOST:
            typer.echo(printable(f"no counterpart: {fate.shown}: {fate.why}"), err=True)
    if out is not None:
        _tell(draft, out)
    if fault := check(draft):
        raise UserError(f"{out or 'the configuration'} is written, and would be refused: {fault}")
    if strict and (missing := lost(draft)):
        raise UserError(f"--strict: {len(missing)} without a counterpart: {', '.join(missing)}")


def _write(out: Path, text: str) -> None:
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UserError(f"--out {out} exists; name another file, or remove it") from None
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror or error}") from None


def _tell(draft, out: Path) -> None:
    counts: dict[str, int] = {}
    for fate in draft.fates:
        counts[fate.what] = counts.get(fate.what, 0) + 1
    told = ", ".join(f"{number} {what}" for what, number in counts.items())
    typer.echo(f"{out}: {len(draft.keys)} keys, made of {len(draft.given)} options ({told})")
    data = f"Look at the data with `dpo-fast data {out}`, then `dpo-fast train {out} --dry-run`."
    rounds = f"Look at the rounds with `dpo-fast iterate {out} --dry-run`."
    typer.echo(rounds if draft.rounds else data)
