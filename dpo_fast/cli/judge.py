"""`dpo-fast judge`: scores of completions, and pairs made of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from dpo_fast.cli.config import Overrides
from dpo_fast.cli.later import import_when_used
from dpo_fast.errors import UserError
from dpo_fast.training.config_file import read_tree

Rounds = Annotated[str, typer.Argument(help="YAML file, see docs/ROUNDS.md", metavar="FILE")]
LENGTH_DECIDES = 0.5  # a correlation within prompts that is worth a word


def judge(
    config: Rounds,
    overrides: Overrides = None,
    nproc: Annotated[int, typer.Option(min=1, help="start this many local ranks")] = 1,
    quiet: Annotated[
        bool, typer.Option("--quiet", help="show errors and the result alone")
    ] = False,
) -> None:
    """Score the samples of a folder by the section judge, and make pairs by the section pairs.

    It goes on where it was interrupted, and uses what is complete as it is.
    """
    tree = read_tree(config, overrides or (), ("output_dir", "model", "judge", "pairs"))
    import_when_used("torch")
    from dpo_fast.rounds.config import RoundsConfig
    from dpo_fast.training.config import build

    rounds = build(RoundsConfig, tree, config)
    from dpo_fast.progress import hush
    from dpo_fast.training import console, distributed

    distributed.adopt_slurm()
    hush(quiet)
    if nproc > 1:
        _launch(nproc, ["judge", config, *(overrides or ()), *["--quiet"] * quiet])
    from dpo_fast.rounds.judge import judge as judge_samples

    if rounds.judge is not None and rounds.judge.type in ("reward_model", "implicit"):
        console.quiet()
    found = judge_samples(rounds)
    if distributed.is_main():
        show(found, Console())
        typer.echo(f"pairs: {Path(rounds.output_dir) / 'pairs.jsonl'}")
    distributed.leave_distributed()


def _launch(nproc: int, arguments: list[str]) -> None:
    from dpo_fast.cli.launch import launch
    from dpo_fast.training import distributed

    if distributed.world_size() > 1:
        raise UserError(f"--nproc {nproc} starts ranks itself: leave it out under a launcher")
    raise typer.Exit(launch(nproc, arguments))


def show(found: dict[str, Any], console: Console) -> None:
    """The report of a judging as a table, and what it should make one think of."""
    table = Table(show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, value in found.items():
        if isinstance(value, dict) and name != "reasons":
            for inner, count in value.items():
                table.add_row(f"{name}: {inner}", f"{count:,}")
        elif value is not None and name != "reasons":
            table.add_row(
                name.replace("_", " "), f"{value:,}" if isinstance(value, int) else str(value)
            )
    console.print(table)
    for note in notes(found):
        console.print(note, markup=False, highlight=False, soft_wrap=True)


def notes(found: dict[str, Any]) -> list[str]:
    """What a report should make one think of, in sentences."""
    said = []
    for word, examples in found["reasons"].items():
        said.append(
            f"{found['verdicts'][word]:,} completions {word}, the first of them {examples[0]}"
        )
    length = found["score_length_correlation_within_prompts"]
    if length is not None and abs(length) >= LENGTH_DECIDES:
        longer = "longer" if length > 0 else "shorter"
        said.append(
            f"the judge prefers {longer} answers (correlation of score and length within prompts "
            f"{length:+.2f}): look at pairs.max_length_ratio"
        )
    counts = found.get("comparisons", {})
    places = [counts.get(f"won by the {place}", 0) for place in ("first", "second")]
    if sum(places) >= 10 and max(places) >= 0.8 * sum(places):
        place = "first" if places[0] > places[1] else "second"
        said.append(
            f"the judge goes by the place: the {place} answer won {max(places):,} of {sum(places):,} "
            "comparisons"
        )
    return said
