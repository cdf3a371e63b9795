"""`dpo-fast export`: the model out of a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from dpo_fast.errors import UserError

DTYPES = ("auto", "bf16", "fp16", "fp32")


def export(
    checkpoint: Annotated[
        str,
        typer.Argument(
            help="a checkpoint, or a run's folder: its newest one; with --merge also an adapter",
            metavar="CHECKPOINT",
        ),
    ],
    out: Annotated[
        str | None,
        typer.Argument(help="folder to write; default: CHECKPOINT-model, beside it", metavar="OUT"),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="section.key=value, such as train.merge_lora=true", metavar="KEY=VALUE"
        ),
    ] = None,
    merge: Annotated[
        bool,
        typer.Option("--merge", help="write the model with its adapter merged, and no adapter"),
    ] = False,
    dtype: Annotated[
        str | None,
        typer.Option(help="of the merged model: bf16, fp16, fp32, or auto, that of its base"),
    ] = None,
) -> None:
    """Write the model of a checkpoint as a Hugging Face folder, or the adapter of one with LoRA.

    Of any ZeRO stage and number of ranks, on one. The weights are those of the run at that step. With
    --merge an adapter's folder will do as well.
    """
    target, changes = split(out, overrides)
    if not Path(os.path.expanduser(checkpoint)).is_dir():
        raise UserError(f"{checkpoint}: no such folder; expected a checkpoint, or a run's folder")
    _check_merge(merge, dtype)
    from dpo_fast.training.console import quiet

    quiet()
    from dpo_fast.models.checkpoint import is_adapter
    from dpo_fast.training.checkpoint_run import export_checkpoint, merge_adapter
    from dpo_fast.training.checkpoints import is_checkpoint

    alone = is_adapter(checkpoint) and not is_checkpoint(Path(os.path.expanduser(checkpoint)))
    if alone and not merge:
        raise UserError(
            f"{checkpoint} is an adapter already; --merge writes it merged into its base"
        )
    found = Path(os.path.expanduser(checkpoint)) if alone else find(checkpoint)
    found = found if found.name else found.absolute()  # `.` has no name
    folder = Path(os.path.expanduser(target)) if target else found.with_name(f"{found.name}-model")
    if alone:
        merge_adapter(found, folder, dtype or "auto", changes)
    else:
        asked = ["train.merge_lora=true"] if merge else []
        asked += [f"train.merge_dtype={dtype}"] if dtype else []
        export_checkpoint(found, folder, [*changes, *asked], merge)
    typer.echo(f"model: {folder}")


def _check_merge(merge: bool, dtype: str | None) -> None:
    """Raises UserError for a dtype that there is not, or that nothing is written in."""
    if dtype is not None and not merge:
        raise UserError(
            f"--dtype {dtype} is of a merged model: add --merge. A model that was trained whole is "
            "written in the dtype of its run, or in another with model.dtype=DTYPE"
        )
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: expected one of {', '.join(DTYPES)}")


def find(path: str) -> Path:
    """The checkpoint that is named. Raises UserError if it is none."""
    from dpo_fast.training.checkpoint_run import checkpoint_of

    found = checkpoint_of(path)
    if found is None:
        raise UserError(
            f"{path} is no checkpoint: expected a folder checkpoint-N with state.json and engine/, or the "
            "output_dir of a run that has one"
        )
    return found


def split(first: str | None, rest: Sequence[str] | None) -> tuple[str | None, list[str]]:
    """An argument that may be left out, and key=value after it."""
    words = [word for word in (first, *(rest or ())) if word is not None]
    if words and not is_override(words[0]):
        return words[0], words[1:]
    return None, words


def is_override(word: str) -> bool:
    """Whether a word of the command line is section.key=value."""
    from dpo_fast.training.config_file import SECTIONS

    return "=" in word and word.partition("=")[0].partition(".")[0] in SECTIONS
