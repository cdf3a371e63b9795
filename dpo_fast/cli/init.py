"""`dpo-fast init`: a commented configuration, made of a file in configs/ or recipes/."""

from __future__ import annotations

import os
import re
from importlib import resources
from itertools import chain, islice
from pathlib import Path

from dpo_fast import bounded_yaml
from dpo_fast.data.config import DataConfig
from dpo_fast.data.parts import parts_of
from dpo_fast.data.verdicts import BadRows
from dpo_fast.errors import UserError

OWN = ("dpo", "lora", "cdpo_sft", "grpo", "sft")  # configs/: for a model and data of one's own
# recipes/: they name both. Those of stages are for `dpo-fast iterate`.
IN_STAGES = ("zephyr_ddpo", "sdpo", "iterated_dpo", "dno")
PUBLISHED = ("zephyr_dpo", "tulu3_8b", "smollm3_apo", "lora_24gb", *IN_STAGES)
RECIPES = (*OWN, *PUBLISHED)
MODEL, DATA = "my-model", "my-pairs.jsonl"  # where a configuration of one's own names none
EVAL_ROWS = "  eval_rows: 200 # rows held out of train for evaluation"


def write_config(out: Path, recipe: str, model: str | None, data: str | None) -> None:
    """Write the recipe with this model, this data and an output folder of the file's name.

    model, data: None leaves those of a published recipe, and names `MODEL` and `DATA` in others. Of a
        file that has fewer rows than the recipe needs, a tenth is held out for evaluation.

    Raises:
        UserError: no such recipe, one of several sources, the file exists, or it cannot be written.
    """
    if recipe not in RECIPES:
        raise UserError(f"--recipe {recipe}: choose from {', '.join(RECIPES)}")
    lines = recipe_text(recipe).splitlines()
    comments = [line for line in lines if line.startswith("#")]
    body = "\n".join(line for line in lines if not line.startswith("#"))
    if recipe in OWN:
        comments, model, data = [], model or MODEL, data or DATA
    if model is not None:
        body = re.sub(r"^  revision: .*\n", "", body, flags=re.M)  # of the recipe's own model
    if data is not None:
        body = re.sub(r"^  eval: .*$", EVAL_ROWS, body, flags=re.M)  # of the recipe's own data
        if (held_out := _held_out(data, body)) is not None:
            body = re.sub(r"^(  eval_rows: )\d+", rf"\g<1>{held_out}", body, flags=re.M)
    for key, value in {"path": model, "train": data, "output_dir": f"runs/{out.stem}"}.items():
        body = body if value is None else _with(body, key, value, recipe)
    head = (
        *_schema(recipe),
        *(line for line in comments if not line.startswith("#   dpo-fast ")),
        *_commands(recipe, out),
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


def _schema(recipe: str) -> list[str]:
    """The line by which editors complete a run; files of stages have no schema."""
    file = resources.files("dpo_fast") / "configs" / "schema.json"
    return [] if recipe in IN_STAGES else [f"# yaml-language-server: $schema={file}"]


def _commands(recipe: str, out: Path) -> list[str]:
    """What to do with the file."""
    if recipe in IN_STAGES:
        return [
            "# docs/ROUNDS.md has the sections of stages, docs/CONFIG.md those of a run.",
            f"#   dpo-fast doctor {out}             shows what each stage would use",
            f"#   dpo-fast iterate {out} --nproc 8  runs all stages; interrupted, it goes on",
        ]
    return [
        "# docs/CONFIG.md has every key; so has `dpo-fast config schema`.",
        f"#   dpo-fast data {out}    shows the examples, what is cut and what is left out",
        f"#   dpo-fast train {out}   trains; --nproc 2 on two GPUs",
    ]


def recipe_text(recipe: str) -> str:
    """The file that a recipe is."""
    folder = resources.files("dpo_fast") / ("configs" if recipe in OWN else "recipes")
    return (folder / f"{recipe}.yaml").read_text(encoding="utf-8")


def _with(body: str, key: str, value: str, recipe: str) -> str:
    """The body with another value of a key, which stands once in it. Raises UserError."""
    line = re.search(rf"^(?:  )?{key}: ([^\s#]+)", body, re.M)
    if line is None or (key == "train" and recipe in IN_STAGES):
        raise UserError(
            f"--data {value}: the recipe {recipe} reads several sources; leave --data out, and edit "
            "them in the file"
        )
    return body[: line.start(1)] + _scalar(value) + body[line.end(1) :]


def _scalar(value: str) -> str:
    """The value as YAML has it, in quotes where it needs them."""
    return bounded_yaml.dump(value, width=float("inf"), allow_unicode=True).splitlines()[0]
