"""`dpo-fast sample`: completions of prompts from a model."""

from __future__ import annotations

from typing import Annotated

import typer

from dpo_fast.cli.later import import_when_used
from dpo_fast.errors import UserError

SECTIONS = ("output_dir", "model", "data", "sample", "judge", "pairs")


def sample(
    config: Annotated[
        str, typer.Argument(help="YAML file with a section sample", metavar="CONFIG")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="section.key=value, such as sample.temperature=0.7", metavar="KEY=VALUE"
        ),
    ] = None,
    nproc: Annotated[int, typer.Option(min=1, help="start this many local ranks")] = 1,
    quiet: Annotated[
        bool, typer.Option("--quiet", help="show errors and the result, nothing else")
    ] = False,
) -> None:
    """Sample completions of prompts from a model, and score them once.

    They lie in output_dir/samples.jsonl, with log-probs beside them in samples.logps.parquet. After an
    interruption the same command goes on, also with another number of ranks.
    """
    from dpo_fast.training.config_file import read_tree

    tree = read_tree(config, overrides or (), SECTIONS)
    import_when_used("torch")
    from dpo_fast.rounds.config import RoundsConfig
    from dpo_fast.training.config import build

    rounds = build(RoundsConfig, tree, config)
    from dpo_fast.progress import hush
    from dpo_fast.training import console, distributed

    distributed.adopt_slurm()
    console.quiet()
    hush(quiet)
    from dpo_fast.rounds.sample import sample as sample_rounds
    from dpo_fast.rounds.sample import section_of

    section_of(rounds)
    if nproc > 1:
        _launch(nproc, [config, *(overrides or ()), *["--quiet"] * quiet])
    rows = sample_rounds(rounds)
    if distributed.is_main():
        typer.echo(f"samples: {rows}")
    distributed.leave_distributed()


def _launch(nproc: int, arguments: list[str]) -> None:
    from dpo_fast.cli.launch import launch
    from dpo_fast.training import distributed

    if distributed.world_size() > 1:
        raise UserError(f"--nproc {nproc} starts ranks itself: leave it out under a launcher")
    raise typer.Exit(launch(nproc, ["sample", *arguments]))
