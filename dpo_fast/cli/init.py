"""`dpo-fast init`: a commented configuration for one's own model and data, made of a recipe in configs/."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

import yaml

from dpo_fast.errors import UserError

RECIPES = ("dpo", "lora", "cdpo_sft", "grpo")


def write_config(out: Path, recipe: str, model: str, data: str) -> None:
    """Write the recipe with this model, this data and an output folder of the file's name.

    Raises:
        UserError: no such recipe, the file exists, or it cannot be written.
    """
    if recipe not in RECIPES:
        raise UserError(f"--recipe {recipe}: choose from {', '.join(RECIPES)}")
    folder = resources.files("dpo_fast") / "configs"
    lines = (folder / f"{recipe}.yaml").read_text(encoding="utf-8").splitlines()
    body = "\n".join(line for line in lines if not line.startswith("#"))
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


def _scalar(value: str) -> str:
    """The value as YAML has it, in quotes where it needs them."""
    return yaml.safe_dump(value, width=float("inf"), allow_unicode=True).splitlines()[0]
