"""`dpo-fast init`: a commented configuration for one's own model and data, made of a recipe in configs/."""

from __future__ import annotations

import os
import re
from importlib import resources
from itertools import chain, islice
from pathlib import Path

import yaml

from dpo_fast.data.config import DataConfig
from dpo_fast.data.parts import parts_of
from dpo_fast.data.verdicts import BadRows
from dpo_fast.errors import UserError

RECIPES = ("dpo", "lora", "cdpo_sft", "grpo")


def write_config(out: Path, recipe: str, model: str, data: str) -> None:
    """Write the recipe with this model, this data and an output folder of the file's name.

    Of a file that has fewer rows than the recipe needs, a tenth is held out for evaluation.

    Raises:
        UserError: no such recipe, the file exists, or it cannot be written.
    """
    if recipe not in RECIPES:
        raise UserError(f"--recipe {recipe}: choose from {', '.join(RECIPES)}")
    folder = resources.files("dpo_fast") / "configs"
    lines = (folder / f"{recipe}.yaml").read_text(encoding="utf-8").splitlines()
    body = "\n".join(line for line in lines if not line.startswith("#"))
    if (held_out := _held_out(data, body)) is not None:
        body = re.sub(r"^(  eval_rows: )\d+", rf"\g<1>{held_out}", body, flags=re.M)
    for key, value in {"path": model, "train": data, "output_dir": f"runs/{out.stem}"}.items():
        line = re.search(rf"^  {key}: (\S+)", body, re.M)
        body = body[: line.start(1)] + _scalar(value) + body[line.end(1) :]
    head = (
        f"# yaml-language-server: $schema={folder / 'schema.json'}",
        "# docs/CONFIG.md has every key; so has `dpo-fast config schema`.",
        f"#   dpo-fast data {out}    shows the examples, what is cut and what is left out",
        f"#   dpo-fast train {out}   trains; --nproc 2 on two GPUs",
    )
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write("\n".join((*head, body, "")))
    except FileExistsError:
        raise UserError(f"{out} exists; name another file, or remove it") from None
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror or error}") from None


def _held_out(data: str, body: str) -> int | None:
    """Rows to hold out for evaluation, where the data are here and few: a tenth of them."""
    usual = re.search(r"^  eval_rows: (\d+)", body, re.M)
    if usual is None or not os.path.exists(os.path.expanduser(data)):
        return None
    most = 10 * int(usual[1])
    try:
        config = DataConfig(train=data)
        rows = chain.from_iterable(each.read(BadRows("skip")) for each in parts_of(config, "train"))
        count = sum(1 for _ in islice(rows, most))
    except UserError:
        return None  # `data` and `train` tell what is wrong
    return max(count // 10, 1) if 1 < count < most else None


def _scalar(value: str) -> str:
    """The value as YAML has it, in quotes where it needs them."""
    return yaml.safe_dump(value, width=float("inf"), allow_unicode=True).splitlines()[0]
