"""`dpo-fast config ...`: what a configuration may hold, and what one comes to."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from dpo_fast import bounded_yaml
from dpo_fast.cli.later import import_when_used
from dpo_fast.errors import UserError
from dpo_fast.training.config_file import read_tree

app = typer.Typer(
    help="Look at configurations; docs/CONFIG.md has every key.", no_args_is_help=True
)
Config = Annotated[str, typer.Argument(help="YAML file, see configs/", metavar="CONFIG")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="section.key=value", metavar="KEY=VALUE")
]


def load(config: str, overrides: Sequence[str] | None, places: bool = True, trains: bool = True):
    """The run of a file, as a RunConfig. What is wrong is told before transformers and PyTorch are there.

    places: look for the models and the data, too.
    trains: the command trains or scores; otherwise the section `train` may be missing.
    """
    tree = read_tree(config, overrides or ())
    if not trains and isinstance(tree.get("train", {}), dict):
        tree["train"] = {"output_dir": "."} | (tree.get("train") or {})
    import_when_used("torch")
    from dpo_fast.training.config import build_config

    run = build_config(tree, config)
    if places:
        from dpo_fast.training.places import check_places

        check_places(run)
    return run


@app.command()
def show(config: Config, overrides: Overrides = None) -> None:
    """Print the whole configuration, with every default filled in. The output is itself one."""
    tree = load(config, overrides, places=False).resolved()
    typer.echo(bounded_yaml.dump(tree, sort_keys=False, allow_unicode=True), nl=False)


@app.command()
def schema(
    out: Annotated[
        Path | None, typer.Option(help="write to this file, not to the terminal")
    ] = None,
) -> None:
    """Print the JSON schema of a configuration, with which editors complete and check one."""
    from dpo_fast.training.config_schema import editor_schema

    text = json.dumps(editor_schema(), indent=2, ensure_ascii=False) + "\n"
    if out is None:
        typer.echo(text, nl=False)
        return
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror}") from None
    typer.echo(out)
