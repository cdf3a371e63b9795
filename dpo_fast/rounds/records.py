"""What a step was made with, so that nothing that was edited meanwhile is gone on with in silence.

stage-1/begun.json    written when a step begins: its options, its data and the models that it begins with
stage-1/stage.json    written last: the same, the model that came of it, and the files that lie there.
                      A step that has it is complete
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dpo_fast import durable
from dpo_fast.data.parts import parts_of
from dpo_fast.data.sources import HubSource
from dpo_fast.errors import UserError
from dpo_fast.rounds import rows
from dpo_fast.rounds.plan import Plan, Step
from dpo_fast.rounds.rows import judge_of
from dpo_fast.rounds.sample import data_of
from dpo_fast.training.config import RunConfig
from dpo_fast.training.hub import OPTIONS as OF_THE_HUB
from dpo_fast.training.manifest import hash_file
from dpo_fast.training.weights import identity_on_this_rank

BEGUN, DONE = "begun.json", "stage.json"
FORMAT = 1
# Options of a run that change nothing, or rounding alone: they may differ from start to start. So may what
# a run checks itself when it goes on.
FREE = {
    *("parallel", "log", "health", "generate", "model.attention", "model.gradient_checkpointing"),
    *("model.checkpoint_layers", "model.use_liger_kernel", "model.torch_compile"),
    *("model.activation_offloading", "model.tiled_mlp"),
    *("data.workers", "data.cache_dir", "data.max_row_bytes", "reference.cache_dir"),
    *("reference.offload", "train.output_dir", "train.resume_from_checkpoint"),
    *("train.overwrite_output_dir", "train.optimizer_from", "train.change_on_resume"),
    *("train.skip_rows", "train.micro_batch_size", "train.layout", "train.implementation"),
    *("train.workspace_bytes", "train.eval_steps", "train.save_steps", "train.save_total_limit"),
    *("train.save_model", "train.async_save", "train.nonfinite", "train.max_nonfinite_steps"),
    *(f"train.{name}" for name in OF_THE_HUB),
}
# Told by what they hold.
OTHERWISE = {"model.path", "model.adapter_path", "model.adapters", "reference.path", "data.train"}


def made_with(plan: Plan, step: Step) -> dict[str, Any]:
    """What a step is made with: options by name, models by their weights, data by their content.

    What it begins with must be there. Rank 0 calls.

    Raises:
        UserError: data or a model cannot be read.
    """
    run = plan.run(step)
    return {
        "format": FORMAT,
        "options": options(plan, step),
        "models": models(plan, step, run),
        "data": data(plan, step),
        "judge": judge_of(plan.rounds(step), complete=False) if step.stage.samples else {},
    }


def of_average(made: dict[str, Any]) -> list[Any]:
    """What decides the mixture that a step compares with. made: as from `made_with`."""
    return [made["options"].get("mixup_alpha"), made["models"]]


def options(plan: Plan, step: Step) -> dict[str, Any]:
    """The options that decide what comes of a step."""
    stage = step.stage
    found = {name: getattr(stage, name) for name in ("start_from", "reference", "optimizer")}
    if stage.reference == "ema":
        found["mixup_alpha"] = stage.mixup_alpha
    if not Path(path := plan.config.model.path).expanduser().is_dir():
        found["model.path"] = path  # of the hub
    left = FREE | OTHERWISE
    if step.stage.samples:
        found |= rows.options(plan.rounds(step, plan.config.model))
    return found | {
        name: value
        for name, value in flat(plan.rehearsal(step).resolved())
        if name not in left and name.partition(".")[0] not in left
    }


def models(plan: Plan, step: Step, run: RunConfig, complete: bool = False) -> dict[str, str]:
    """The weights that a step begins from and compares with, by the option that names them.

    complete: the step needs them no more. Folders that are not there any longer, and the hub, are passed
    over.
    """
    paths = {"model.path": run.model.path}
    mixture = plan.averages(step)
    reference = run.reference.path if mixture is None else mixture[0]
    if reference is not None:
        paths["reference.path"] = reference
    if complete:
        paths = {name: path for name, path in paths.items() if Path(path).expanduser().is_dir()}
    return {name: identity_on_this_rank(run, path) for name, path in paths.items()}


def data(plan: Plan, step: Step, complete: bool = False) -> dict[str, list[dict[str, Any]]]:
    """Each source that a step reads, in their order: its name, a hash of its content, and its own options.

    complete: the step reads them no more. What is not there any longer is passed over, and the hub has no
    hash.
    """
    found, run = {}, plan.rehearsal(step).data
    rows_of = data_of(plan.rounds(step, plan.config.model)) if step.stage.samples else run
    alone = run.model_copy(update={"train": run.eval})  # the pairs of a round are yet to be made
    for role, section in (("train", rows_of), ("eval", alone)):
        if role == "eval" and run.eval is None:
            continue
        try:
            parts = parts_of(section, role)
        except UserError:
            if complete:
                continue
            raise
        found[role] = [
            {
                "source": str(source),
                "content": None
                if complete and isinstance(source, HubSource)
                else source.identity().rpartition("=")[2],
                "options": part.entry.own if part.entry else {},
            }
            for part in parts
            for source in part.sources
        ]
    return found


def flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested sections, as `loss.beta`."""
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and (not prefix or key == "model.lora"):
            if prefix:
                yield key, "given"
            yield from flat(value, f"{key}.")
        else:
            yield key, value


def read(step: Step, name: str) -> dict[str, Any] | None:
    """A record of a step; None if it has none. Raises UserError if it cannot be read."""
    file = step.folder / name
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or not isinstance(content.get("made_with"), dict):
            raise ValueError("it is no record of a stage")
        return content
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read: {error}; {_begin_anew(step)}") from None


def is_complete(step: Step) -> bool:
    return (step.folder / DONE).is_file()


def write(step: Step, name: str, content: dict[str, Any]) -> None:
    """Write a record, whole or not at all. Raises UserError."""
    file = step.folder / name
    with durable.writing(file, "What is complete is kept: make room, and the same command goes on"):
        step.folder.mkdir(parents=True, exist_ok=True)
        durable.write_file(file, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def files_of(step: Step, names: list[str]) -> dict[str, dict[str, Any]]:
    """Size, time and sha256 of files that a step has made, by name."""
    found = {}
    for name in names:
        file = step.folder / name
        found[name] = {"sha256": hash_file(file).sha256, **_stamp(file)}
    return found


def check_files(plan: Plan, step: Step, record: dict[str, Any]) -> None:
    """Raises UserError for a file or model of a step that is not what was written.

    What looks it is not read.
    """
    made = record.get("identity")
    if step.model.is_dir() and identity_on_this_rank(plan.rehearsal(step), str(step.model)) != made:
        raise UserError(
            f"{plan.where}: {step.model} holds other weights than {step.name} made: put them back, "
            f"{_or_anew(plan, step)}"
        )
    for name, before in record.get("files", {}).items():
        file = step.folder / name
        if not file.is_file():
            continue  # removed to save room; nothing reads it again
        if {key: before.get(key) for key in _stamp(file)} == _stamp(file):
            continue
        if files_of(step, [name])[name]["sha256"] != before.get("sha256"):
            raise UserError(
                f"{plan.where}: {file} was changed after {step.name} was made of it: put it back, "
                f"{_or_anew(plan, step)}"
            )


def check_same(plan: Plan, step: Step, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises UserError if a step was begun with something else than it has now.

    before, now: as from `made_with`; what one of them lacks is not compared.
    """
    told = [
        f"{name} was {before['options'][name]!r} and is {value!r}"
        for name, value in now["options"].items()
        if before["options"].get(name, value) != value
    ]
    told += [
        f"{name} of the judge is another"
        for name, value in now.get("judge", {}).items()
        if before.get("judge", {}).get(name, value) != value
    ]
    told += [
        f"the weights of {name} are others"
        for name, value in now.get("models", {}).items()
        if before["models"].get(name, value) != value
    ]
    for role, sources in now["data"].items():
        told += _of_sources(role, before["data"].get(role, sources), sources)
    if told:
        raise UserError(
            f"{plan.where}: {step.option} is not what {step.name} was made with: {'; '.join(told[:6])}. "
            f"Set it back, {_or_anew(plan, step)}"
        )


def _of_sources(role: str, before: list[dict], now: list[dict]) -> list[str]:
    """What differs between the sources that a step was made with, and those that it has now."""
    if [each["options"] for each in before] != [each["options"] for each in now]:
        names = (
            [{"path": each["source"], **each["options"]} for each in sources]
            for sources in (before, now)
        )
        return ["data.{} was {} and is {}".format(role, *names)]
    contents = [each["content"] for each in before]
    others = [
        each
        for each, content in zip(now, contents)
        if each["content"] is not None and each["content"] != content
    ]
    if others and all(each["content"] in contents for each in others):
        return [f"the sources of data.{role} are in another order"]
    return [f"{each['source']} holds other data than it read" for each in others]


def _or_anew(plan: Plan, step: Step) -> str:
    """How to go on with what was edited."""
    later = plan.steps[plan.steps.index(step) :]
    names = [each.name for each in later if each.folder.exists()] or [step.name]
    remove = f"remove {', '.join(names)} in {plan.config.output_dir} to make them anew"
    return f"name another output_dir, or {remove}"


def _begin_anew(step: Step) -> str:
    return f"remove {step.folder} and the stages after it to make them anew"


def _stamp(file: Path) -> dict[str, int]:
    found = os.stat(file)
    return {"size": found.st_size, "mtime_ns": found.st_mtime_ns}
