"""What an `iterate` file comes to: its steps in order, and the run that each trains."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_fast.data.entries import READING
from dpo_fast.errors import UserError
from dpo_fast.judging.config import OF_GROUPS
from dpo_fast.models.checkpoint import is_adapter
from dpo_fast.models.config import ModelSection
from dpo_fast.rounds.config import OF_A_RUN, RoundsConfig
from dpo_fast.rounds.stages import StageSection
from dpo_fast.training.checkpoints import checkpoints
from dpo_fast.training.config import RunConfig, build
from dpo_fast.training.earlier_run import GENERATIONS, MODEL
from dpo_fast.training.hub import OPTIONS as HUB
from dpo_fast.training.log_section import NO_LOGGER
from dpo_fast.training.merge import FOLDER as MERGED_BASE

TRAIN, PAIRS, SCORES, AVERAGE = "train", "pairs.jsonl", "scores.jsonl", "reference-model"
# Columns for the loss, by the option of the section pairs that writes each.
WRITTEN = {"soft_label": "soft_label", "margin_column": "margin"}
# Keys of a run that the stages decide, by the key that does.
DECIDED = {
    "train.output_dir": "output_dir",
    "train.resume_from_checkpoint": "the same command, which goes on by itself",
    "train.overwrite_output_dir": "another output_dir",
    "train.optimizer_from": "optimizer of a stage",
    "reference.path": "reference of a stage",
    "reference.revision": "reference of a stage",
    "data.train": "data of a stage",
}


@dataclass(frozen=True)
class Step:
    """A stage, or one round of a stage that samples.

    number: of the stage, counted from 1. round: counted from 1; 0 where the stage samples nothing.
    folder: what it makes lies there.
    """

    stage: StageSection
    number: int
    round: int
    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def option(self) -> str:
        """What the file calls the stage."""
        return f"stages.{self.number - 1}"

    @property
    def run(self) -> Path:
        """The folder of its training."""
        return self.folder / TRAIN

    @property
    def model(self) -> Path:
        """The model that it makes."""
        return self.run / MODEL


class Plan:
    """The steps of a file, and what each begins with. where: the file, for errors."""

    def __init__(self, config: RoundsConfig, where: str) -> None:
        self.config, self.where = config, where
        if not config.stages:
            raise UserError(
                f"{where}: stages is missing: a list of what is trained on, as in `stages: [{{data: "
                "a.jsonl}]`"
            )
        self.steps = list(_steps(config))
        for step in self.steps:
            self._check(step)

    @property
    def start(self) -> str:
        """The model that everything begins with, as a path."""
        model = self.config.model
        if model.adapter == "merge" and is_adapter(model.path):
            merged = self.steps[0].run / MERGED_BASE
            return str(merged) if merged.is_dir() else model.path
        return model.path

    def before(self, step: Step) -> Step | None:
        """The step before."""
        index = self.steps.index(step)
        return self.steps[index - 1] if index else None

    def policy(self, step: Step) -> ModelSection:
        """The policy that answers prompts in a step: what the step before has made."""
        before = self.before(step)
        return self.config.model if before is None else self._trained(before)

    def _trained(self, step: Step) -> ModelSection:
        """The model that a step makes. An adapter is trained further; a new one is not put on it."""
        unused = {"path": str(step.model), "lora": None, "adapter": None}
        return self.config.model.model_copy(update=unused)

    def named(self, path: str) -> str:
        """A model for people: the step that makes it, or its path."""
        made = {str(step.model): step.name for step in self.steps}
        return made.get(path, path)

    def begins_with(self, step: Step) -> ModelSection:
        """The model that a step trains."""
        return self.config.model if step.stage.start_from == "start" else self.policy(step)

    def reference(self, step: Step) -> str:
        """The path of the model that a step compares with."""
        before, kind = self.before(step), step.stage.reference
        if before is None or kind == "start":
            return self.start
        if kind == "ema" and self.compares(before):
            return str(step.folder / AVERAGE)
        return str(before.model)

    def averages(self, step: Step) -> tuple[str, str] | None:
        """The reference before and the policy before, where a step compares with a mixture of them."""
        before = self.before(step)
        if before is None or step.stage.reference != "ema" or not self.compares(before):
            return None
        return self.reference(before), str(before.model)

    def compares(self, step: Step) -> bool:
        """Whether the loss of a step compares with a reference."""
        return self.rehearsal(step).reference_spec.compares

    def rehearsal(self, step: Step) -> RunConfig:
        """The run of a step with the model of the start for one that is yet to be made."""
        return self._build(step, self.config.model, None)

    def run(self, step: Step) -> RunConfig:
        """The run of a step. What it begins with must be there."""
        model = self.begins_with(step)
        path = self.reference(step) if self.compares(step) else None
        # The policy as it starts is what a path of its own would load a second time.
        own = path == model.path or (step is self.steps[0] and path == self.start)
        if path == self.config.model.path and self.config.model.told_base and not own:
            path = str(self._kept(Path(path)))
        run = self._build(step, model, None if own else path)
        sampler = self.policy(step).path
        run = self._with_first_answers(step, run)
        if step.stage.samples and run.old_model is not None and sampler != model.path:
            wrote = run.reference.model_copy(update={"old_path": sampler})
            run = run.model_copy(update={"reference": wrote})
        return run

    def _kept(self, start: Path) -> Path:
        """A copy of the start's adapter, which lies in the cache: files of later stages name it."""
        folder = Path(self.config.output_dir)
        kept = folder / f"start-{start.name}"
        if not kept.is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            aside = Path(tempfile.mkdtemp(prefix=".start-", dir=folder))
            shutil.copytree(start, aside, dirs_exist_ok=True)
            try:
                aside.rename(kept)
            except OSError:  # another rank was faster
                shutil.rmtree(aside, ignore_errors=True)
        return kept

    def _with_first_answers(self, step: Step, run: RunConfig) -> RunConfig:
        """The run of a later step, which compares its answers with those of the start of the file."""
        section, first = run.generate, self.steps[0].run / GENERATIONS
        if section.judge is None or section.first_answers or step is self.steps[0]:
            return run
        if not first.is_file():
            return run
        told = section.model_copy(update={"first_answers": str(first)})
        return run.model_copy(update={"generate": told})

    def rounds(self, step: Step, model: ModelSection | None = None) -> RoundsConfig:
        """What a step that samples asks of `sample` and `judge`.

        Every step draws anew: its seed is that of the section, and one more for each step before.

        model: in place of the policy, which may be yet to be made.
        """
        config, stage = self.config, step.stage
        sections = {}
        for name in ("sample", "judge", "pairs"):
            section, own = getattr(config, name), getattr(stage, name)
            section = {} if section is None else section.model_dump(mode="json", exclude_unset=True)
            sections[name] = _merged(section, own)
        sections["sample"]["prompts"] = stage.prompts
        seed = sections["sample"].get("seed", 0)
        if isinstance(seed, int):
            sections["sample"]["seed"] = (seed + self.steps.index(step)) % 2**32
        if self.rehearsal(step).loss.objective.grouped:
            sections["pairs"].setdefault("strategy", "groups")
        if (
            sections["pairs"].get("strategy") == "groups"
        ):  # the section's options of pairs do not hold
            kept = OF_GROUPS | set(stage.pairs)
            sections["pairs"] = {k: v for k, v in sections["pairs"].items() if k in kept}
        if not sections["judge"]:
            del sections["judge"]
        tree = {"output_dir": str(step.folder), "data": dict(config.data), **sections}
        tree["model"] = (model or self.policy(step)).model_dump(mode="json")
        return build(RoundsConfig, tree, f"{self.where}: {step.name}")

    def _build(self, step: Step, model: ModelSection, reference: str | None) -> RunConfig:
        tree = self._tree(step)
        tree["model"] = model.model_dump(mode="json")
        if reference is not None:
            tree["reference"] = tree["reference"] | {"path": reference}
        return build(RunConfig, tree, f"{self.where}: {step.name}")

    def _tree(self, step: Step) -> dict[str, Any]:
        """The sections of a step's run, but for its models."""
        config, stage = self.config, step.stage
        tree = {name: dict(getattr(config, name)) for name in OF_A_RUN}
        tree["data"] = dict(config.data) | _data_of(step)
        if stage.samples:
            tree["data"] = _of_own_pairs(tree["data"])
        if tree["generate"] and config.judge is not None:
            judge = config.judge.model_dump(mode="json", exclude_unset=True)
            tree["generate"].setdefault("judge", judge)
        tree["loss"] = _loss_of(config.loss, stage.loss)
        tree["train"] |= stage.train
        if stage.learning_rate is not None:
            tree["train"]["learning_rate"] = stage.learning_rate
        self._check_decided(step, tree)
        tree["train"] = self._pushed(step, tree["train"])
        tree["data"].setdefault("train", str(step.folder / PAIRS))
        tree["train"] |= {
            "output_dir": str(step.run),
            "resume_from_checkpoint": bool(checkpoints(step.run)),
        }
        if stage.optimizer == "carried" and self.before(step) is not None:
            tree["train"]["optimizer_from"] = self._checkpoint(step)
        name = tree["log"].get("run_name")
        tree["log"]["run_name"] = f"{name}-{step.name}" if name else step.name
        if tree["log"].get("report_to") not in (None, [], NO_LOGGER, [NO_LOGGER]):
            tree["log"].setdefault("group", name or Path(config.output_dir).absolute().name)
        return tree

    def _pushed(self, step: Step, train: dict[str, Any]) -> dict[str, Any]:
        """The options of a step's training, by which the last step alone is pushed to the hub."""
        own = next((name for name in HUB if name in step.stage.train), None)
        if own is not None:
            raise UserError(
                f"{self.where}: {step.option}.train.{own} is not for a stage: the model of the last one is "
                "pushed; put it into the section train, or call `dpo-fast push` for another"
            )
        if step is not self.steps[-1]:
            return {name: value for name, value in train.items() if name not in HUB}
        if train.get("push_to_hub"):
            folder = Path(self.config.output_dir).absolute().name
            train = {**train, "hub_model_id": train.get("hub_model_id") or folder}
        return train

    def _check_decided(self, step: Step, tree: dict[str, Any]) -> None:
        """Raises UserError for an option of a run that the stages decide."""
        for key, decides in DECIDED.items():
            section, _, name = key.partition(".")
            given = name in (self.config.data if section == "data" else tree[section])
            if given:
                raise UserError(
                    f"{self.where}: {key} is not for a file of stages: {decides} says it; remove it"
                )

    def _checkpoint(self, step: Step) -> str:
        """The checkpoint whose optimiser a step goes on with: the last of the step before."""
        found = checkpoints(self.before(step).run)
        return str(found[-1] if found else self.before(step).run / "checkpoint-0")

    def _check(self, step: Step) -> None:
        """Raises UserError for what a step cannot have."""
        run, stage, place = self.rehearsal(step), step.stage, f"{self.where}: {step.option}."
        if "reference" in stage.model_fields_set and not run.reference_spec.compares:
            raise UserError(
                f"{place}reference={stage.reference} is not used: loss.type={', '.join(run.loss.names)} "
                "compares with no reference; remove it"
            )
        if stage.reference == "ema":
            self._check_average(run, place)
        if stage.optimizer == "carried":
            self._check_carried(step, place)
        if stage.samples:
            if self.config.judge is not None and self.config.judge.samples is not None:
                raise UserError(
                    f"{self.where}: judge.samples={self.config.judge.samples} is not for a file of stages, "
                    "which judge what they have sampled; remove it, or give it to dpo-fast judge"
                )
            self._check_pairs(step, run)
        if stage.samples and run.data.streaming:
            raise UserError(
                f"{self.where}: data.streaming=true reads data of any size, and the pairs of "
                f"{step.option} are a file; remove it"
            )

    def _check_pairs(self, step: Step, run: RunConfig) -> None:
        pairs, names = self.rounds(step).pairs, ", ".join(run.loss.names)
        groups, objective = pairs.strategy == "groups", run.loss.objective
        place = f"{self.where}: {step.name}: "
        if groups != objective.grouped:
            raise UserError(
                f"{place}pairs.strategy={pairs.strategy}, but loss.type={names} learns from "
                f"{'pairs' if groups else 'groups'}; leave pairs.strategy out"
            )
        for name, column in () if groups else WRITTEN.items():
            given = bool(getattr(pairs, name))
            if given and column not in objective.columns:
                raise UserError(
                    f"{place}pairs.{name} writes the column {column}, which loss.type={names} does "
                    "not use; remove it"
                )
            if not given and column in objective.needed_columns:
                raise UserError(
                    f"{place}loss.type={names} needs the column {column}: set pairs.{name}"
                )

    def _check_average(self, run: RunConfig, place: str) -> None:
        if run.model.has_adapters:
            raise UserError(
                f"{place}reference=ema mixes the weights of two models, and adapters are factors of "
                "weights, whose mixture is another model; choose previous or start"
            )
        if run.reference_spec.follows:
            raise UserError(
                f"{place}reference=ema moves the reference between stages, and reference.provider="
                f"{run.reference_provider} in every one; remove one"
            )

    def _check_carried(self, step: Step, place: str) -> None:
        before = self.before(step)
        if before is None:
            raise UserError(f"{place}optimizer=carried, but there is no stage before; leave it out")
        if step.stage.start_from == "start":
            raise UserError(
                f"{place}optimizer=carried goes with the weights that it was made with, and start_from="
                "start takes others; remove one"
            )
        if self.rehearsal(before).train.load_best_model_at_end:
            raise UserError(
                f"{place}optimizer=carried is that of the last checkpoint of {before.name}, which exports "
                "its best one (train.load_best_model_at_end); remove one"
            )


def _steps(config: RoundsConfig) -> Iterator[Step]:
    root = Path(config.output_dir)
    for number, stage in enumerate(config.stages, 1):
        name = f"stage-{number}"
        if not stage.samples:
            yield Step(stage, number, 0, root / name)
            continue
        for each in range(1, stage.rounds + 1):
            yield Step(stage, number, each, root / f"{name}-round-{each}")


def _of_own_pairs(data: dict[str, Any]) -> dict[str, Any]:
    """The section for pairs of ours. How rows are read is said of those with prompts, and of data.eval."""
    reading = {name: data[name] for name in READING if data.get(name) is not None}
    kept = {name: value for name, value in data.items() if name not in READING}
    given = kept.get("eval")
    if reading and given is not None:
        kept["eval"] = [
            reading | ({"path": each} if isinstance(each, str) else each)
            for each in (given if isinstance(given, list) else [given])
        ]
    return kept


def _data_of(step: Step) -> dict[str, Any]:
    data = step.stage.data
    if data is None:
        return {}
    return dict(data) if isinstance(data, dict) else {"train": data}


def _merged(section: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """A section with a stage's options in it. Another type leaves the options of the section behind."""
    other = own.get("type", section.get("type")) != section.get("type")
    return dict(own) if other else section | own


def _loss_of(
    section: dict[str, Any], own: str | list[str] | dict[str, Any] | None
) -> dict[str, Any]:
    """The losses of a stage. Another type leaves the options of the section behind."""
    if own is None:
        return dict(section)
    if not isinstance(own, dict):
        return {"type": own}
    return dict(own) if "type" in own else section | own
