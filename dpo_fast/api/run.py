"""One object for a run: its inputs, `train`, `evaluate`, `save`, and the metrics as data."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard

from dpo_fast import bounded_yaml, durable
from dpo_fast.api import inputs
from dpo_fast.api.ending import Ending, finish
from dpo_fast.api.options import HERE, OBJECTS, check_there, lora_section, plain, tree_of
from dpo_fast.api.own import named_callbacks, named_sampler
from dpo_fast.api.process import as_found
from dpo_fast.api.processing import tokenizer_folder, write_processing
from dpo_fast.api.row_files import rows_file
from dpo_fast.errors import UserError
from dpo_fast.losses.custom import refresh
from dpo_fast.training.config import RunConfig, build_config
from dpo_fast.training.distributed import collective_errors
from dpo_fast.training.own_code import given

if TYPE_CHECKING:
    import os

    import pandas
    from peft import LoraConfig, PeftModel
    from transformers import (
        PreTrainedModel,
        PreTrainedTokenizerBase,
        ProcessorMixin,
        TrainerCallback,
    )

    from dpo_fast.api.row_files import RowsInMemory
    from dpo_fast.data.own_order import Rows as RowsToOrder
    from dpo_fast.training.callbacks import Callback

    OneCallback: TypeAlias = (
        Callback | TrainerCallback | type[Callback] | type[TrainerCallback] | str
    )
    Callbacks: TypeAlias = OneCallback | Sequence[OneCallback | dict[str, dict[str, Any]]]
    Sampler: TypeAlias = Callable[[RowsToOrder, int], Iterable[int]] | Iterable[int] | str
    Name: TypeAlias = str | os.PathLike[str]
    Model: TypeAlias = Name | PreTrainedModel | PeftModel
    Rows: TypeAlias = Name | Sequence[Name] | RowsInMemory


# Of models in memory; of others, as fp16, the machine's.
DTYPES = {"torch.bfloat16": "bf16", "torch.float32": "fp32", "torch.float64": "fp32"}


@dataclass(frozen=True)
class Result:
    """What a run has made.

    model: the folder of the trained model; None after a dry run.
    metrics: the lines of metrics.jsonl, each with its `step`.
    report: the page about the run; None after a dry run, if it could not be written, and on other ranks
        than the first.
    pushed: the address of the model on the hub, with train.push_to_hub on the first rank.
    """

    model: Path | None
    metrics: list[dict[str, Any]] = field(repr=False)  # a notebook shows what a cell ends with
    report: Path | None = None
    pushed: str | None = None

    def dataframe(self) -> pandas.DataFrame:
        """The metrics as a table, a row for every line. Needs pandas."""
        import pandas

        return pandas.DataFrame(self.metrics)


class PreferenceRun:
    """Preference optimisation of a model on data: the run of `dpo-fast train`, bit for bit.

        run = PreferenceRun("my-model", train_dataset=rows, output_dir="runs/mine", beta=0.1)
        result = run.train()
        run.evaluate(held_out)

    Under torchrun every rank makes the same object and calls the same methods.

    model: a folder or hub id, or a model of transformers or peft. What is in memory is written to
        `output_dir/inputs` once (`api/inputs.py`). A whole model that is trained has the trained weights
        afterwards; one that adapters were put on stays as it was.
    config: a RunConfig, the path of a YAML file, or its sections as a dict. Options that stand in it and
        in the other arguments are taken from those.
    train_dataset, eval_dataset: rows as docs/FORMATS.md describes them: a Dataset, a DataFrame, a list of
        dicts, or paths and hub ids (`api/row_files.py`).
    processing_class: a tokenizer or processor, or where one lies; default: the model's.
    ref_model: the reference, if it is not the model as it starts.
    peft_config: peft's LoraConfig; adapters are trained then.
    callbacks: objects or classes of `Callback` or of transformers' TrainerCallback, or what train.callbacks
        takes; in place of those of config.
    sampler: orders the examples of every epoch: a function of rows and epoch, a sampler of torch, or a
        name (`data/own_order.py`).
    options: sections, as in `train={"max_steps": 9}`; dotted keys; or keys that one section alone has.

    Raises:
        UserError: from the method that needs it, naming option, value and remedy.
    """

    def __init__(
        self,
        model: Model | None = None,
        config: RunConfig | Mapping[str, Any] | Name | None = None,
        *,
        train_dataset: Rows | None = None,
        eval_dataset: Rows | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | Name | None = None,
        ref_model: Model | None = None,
        peft_config: LoraConfig | Mapping[str, Any] | None = None,
        callbacks: Callbacks | None = None,
        sampler: Sampler | None = None,
        **options: Any,
    ) -> None:
        self._own: dict[str, Any] = {}
        self._tree = tree_of(config, options | self._named(callbacks, sampler))
        self._model: Any = inputs.uncompiled(model)
        self._given = {
            "ref_model": inputs.uncompiled(ref_model),
            "processing_class": processing_class,
        }
        self._rows = {"train": train_dataset, "eval": eval_dataset}
        self._peft = peft_config
        self._config: RunConfig | None = None
        train = self._tree.get("train")
        if not isinstance(train, (dict, type(None))):
            raise UserError(f"{HERE}: train is not a section but {train!r}; rows are train_dataset")
        output_dir = (train or {}).get("output_dir")
        if not isinstance(output_dir, str):
            raise UserError(f'{HERE}: train.output_dir is missing; say output_dir="runs/mine"')
        self.output_dir = Path(output_dir).expanduser()

    @property
    def config(self) -> RunConfig:
        """The whole configuration. Inputs in memory are files by then. Collective."""
        if self._config is None:
            with self._engine():
                return self._settle()
        return self._config

    def train(
        self, resume_from_checkpoint: bool | Name | None = None, dry_run: bool = False
    ) -> Result:
        """Train, and export the model to `output_dir/final`. Collective.

        resume_from_checkpoint: True for the newest of output_dir, or a checkpoint; default: the option.
        dry_run: do all that comes before the first step.

        Raises:
            UserError: something does not fit, or numbers are not finite.
            Interrupted: Ctrl-C or another signal; the step is finished, and a checkpoint saved.
            Unhealthy: a finding that health.stop_on names.
            LostPeer: another rank is gone.
        """
        with self._engine():
            from dpo_fast.training.loop import train

            self._check_trainable()
            config = self._settle()
            if resume_from_checkpoint is not None:
                asked = {"resume_from_checkpoint": plain(resume_from_checkpoint)}
                tree = config.model_dump(mode="json", exclude_unset=True)
                tree["train"] |= asked
                config = build_config(tree, HERE)
            folder, ending = train(config, dry_run), Ending()
            if folder is not None:
                self._give_back(folder)
                ending = self._finish(config, folder)
        return Result(folder, self.metrics, ending.report, ending.pushed)

    def evaluate(self, dataset: Rows | Mapping[str, Rows] | None = None) -> dict[str, float]:
        """Metrics of the trained model, of the newest checkpoint without one, or of the model itself.

        Rows to train on need not be there.

        dataset: other rows than those of the run's evaluation. Of several by their names, as in
            `{"helpful": rows, "harmless": others}`, each is evaluated by itself, and its name stands in
            its metrics, as in `eval_helpful_loss`. Collective.
        """
        if _are_named(dataset):
            return {
                name.replace("eval_", f"eval_{each}_", 1): value
                for each, rows in dataset.items()
                for name, value in self.evaluate(rows).items()
            }
        with self._engine():
            from dpo_fast.training import distributed
            from dpo_fast.training.evaluate_model import evaluate_model
            from dpo_fast.training.evaluate_options import evaluation_of

            given = None if dataset is None else self._path_of("eval_dataset", dataset)
            config, rows = self._to_evaluate(given)
            world = distributed.world_size()
            with self._subject(config) as (model, file):
                asked = evaluation_of(model, rows, None, file, [], world)
            return evaluate_model(asked)["metrics"]

    def save(self, folder: Name) -> Path:
        """Write the trained model, or that of the newest checkpoint, to a folder. Collective.

        Raises:
            UserError: nothing is trained yet, or the folder is there.
        """
        with self._engine():
            from dpo_fast.training import distributed

            target = Path(folder).expanduser()
            _meet()
            distributed.from_main(partial(self._write, target))
        return target

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl so far, each with its `step`."""
        from dpo_fast.training.earlier_run import METRICS
        from dpo_fast.training.run_log import step_of_line

        file = self.output_dir / METRICS
        lines = file.read_text(errors="replace").splitlines() if file.is_file() else []
        return [json.loads(line) for line in lines if step_of_line(line) is not None]

    @contextlib.contextmanager
    def _engine(self) -> Iterator[None]:
        """Inside, libraries are quiet; afterwards the process is as it was."""
        with as_found(), given(self._own), collective_errors():
            from dpo_fast.training.console import quiet

            quiet()
            refresh()  # of a notebook that has changed its file
            yield

    def _settle(self) -> RunConfig:
        """The configuration with paths in place of objects. Collective."""
        if self._config is None:
            self._config = _built(self._with_paths())
        return self._config

    def _to_evaluate(self, rows: Any) -> tuple[RunConfig, Any]:
        """The configuration of an evaluation, and its rows; None for those of the run. Collective.

        A run without rows to train on has its evaluation's in their place, and is settled anew each time:
        its model may have changed.
        """
        from dpo_fast.training.evaluate_options import OTHER_DATA

        if self._config is None:
            tree = self._with_paths()
            data = tree["data"]
            if data.get("train") is None:
                rows = data.get("eval") if rows is None else rows
                if rows is None:
                    raise UserError(
                        f"{HERE}: there are no rows to evaluate on; {OBJECTS['data.eval']}"
                    )
                kept = {name: value for name, value in data.items() if name not in OTHER_DATA}
                # One row is held out in name alone: options of evaluations are refused without any.
                tree["data"] = kept | {"train": rows, "eval_rows": 1}
                return _built(tree), rows
            self._config = _built(tree)
        return self._config, rows

    def _with_paths(self) -> dict[str, Any]:
        """The sections, not yet checked, with paths in place of objects. Collective."""
        from dpo_fast.training.places import check_writable

        check_writable(str(self.output_dir))
        tree = dict(self._tree)
        for name, options in self._inputs().items():
            tree[name] = {**(tree.get(name) or {}), **options}
        return tree

    def _inputs(self) -> dict[str, dict[str, Any]]:
        """What the arguments say of the sections model, data and reference."""
        found: dict[str, dict[str, Any]] = {"model": self._policy(), "data": {}}
        for split, rows in self._rows.items():
            if rows is not None:
                found["data"][split] = self._path_of(f"{split}_dataset", rows)
        reference = self._given["ref_model"]
        if reference is not None:
            found["reference"] = {"path": self._path_of("ref_model", reference)}
        return found

    def _policy(self) -> dict[str, Any]:
        model, given = self._model, self._given["processing_class"]
        section: dict[str, Any] = {}
        if model is None or inputs.is_name(model):
            section |= {} if model is None else {"path": plain_path(model)}
            if given is not None:
                section["tokenizer"] = self._path_of("processing_class", given)
        else:
            own = self._tree.get("model") or {}
            if not own.get("quantization"):
                inputs.check_unquantised(model, "model")
            section["path"] = self._path_of("model", model)
            dtype = DTYPES.get(str(model.dtype))
            if dtype and "dtype" not in own:
                section["dtype"] = dtype
        if self._peft is not None:
            lora = self._peft
            if not isinstance(lora, Mapping):
                lora = lora_section(lora, self._model_type(section))
            section["lora"] = dict(lora)
        return section

    def _check_trainable(self) -> None:
        """Raises UserError for a whole model with frozen weights that the run would train."""
        model = self._model
        adapters = self._peft is not None or (self._tree.get("model") or {}).get("lora")
        if not (model is None or inputs.is_name(model) or adapters):
            inputs.check_trainable(model, "model")

    def _model_type(self, section: dict[str, Any]) -> str | None:
        """Of the base model, from its configuration."""
        if getattr(self._peft, "target_modules", None) is not None:
            return None  # nobody asks
        path = section.get("path") or self._model_path()
        from dpo_fast.models.config import ModelSection
        from dpo_fast.models.load import load_model_config

        return load_model_config(ModelSection(path=path)).model_type if path else None

    def _model_path(self) -> str | None:
        """Where the model lies, if it is named."""
        given = (self._tree.get("model") or {}).get("path") if self._model is None else self._model
        return None if given is None else str(given)

    def _path_of(self, name: str, value: Any) -> Any:
        """Where an argument lies; what is in memory is written by the first rank of each machine."""
        if inputs.is_name(value):
            return plain_path(value)
        root = (self.output_dir / inputs.FOLDER).absolute()
        if name.endswith("_dataset"):
            write = partial(rows_file, value, root, name)
        elif name == "processing_class":
            write = partial(tokenizer_folder, value, root, self._model_path())
        else:
            inputs.check_model(value, name)
            processing = None
            if name == "model":
                own = getattr(value.config, "_name_or_path", "")
                processing = partial(write_processing, self._given["processing_class"], own)
            write = partial(inputs.model_folder, value, root, name, processing)
        from dpo_fast.training import distributed

        _meet()
        return distributed.main_first(f"inputs/{name}", lambda: str(write()))

    def _named(self, callbacks: Any, sampler: Any) -> dict[str, Any]:
        """Callbacks and sampler as options, which have their names. The objects are kept."""
        found: dict[str, Any] = {}
        if callbacks is not None:
            found["train.callbacks"], objects = named_callbacks(callbacks)
            self._own |= objects
        if sampler is not None:
            found["train.sampler"], objects = named_sampler(sampler)
            self._own |= objects
        return found

    def _finish(self, config: RunConfig, folder: Path) -> Ending:
        from dpo_fast.training.console import say

        return finish(config, folder, say, partial(say, matters=True))

    def _give_back(self, folder: Path) -> None:
        """Put the trained weights into a whole model that was handed over, as other trainers do."""
        from dpo_fast.models.checkpoint import is_adapter

        model = self._model
        if model is None or inputs.is_name(model) or is_adapter(str(folder)):
            return
        trained = type(model).from_pretrained(folder, dtype=model.dtype)
        model.load_state_dict(trained.state_dict())

    @contextlib.contextmanager
    def _subject(self, config: RunConfig) -> Iterator[tuple[str, str | None]]:
        """What is evaluated, and a file that says how where nothing beside it does."""
        from dpo_fast.training.checkpoint_run import checkpoint_of
        from dpo_fast.training.earlier_run import MODEL

        trained = self.output_dir / MODEL
        if trained.exists() and not config.reference_spec.follows:
            yield str(trained), None
        elif checkpoint_of(str(self.output_dir)) is not None:
            yield str(self.output_dir), None
        else:
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "run.yaml"
                file.write_text(bounded_yaml.dump(config.resolved(), sort_keys=False))
                yield config.model.path, str(file)

    def _write(self, target: Path) -> None:
        from dpo_fast.training.checkpoint_run import check_target, checkpoint_of, export_checkpoint
        from dpo_fast.training.earlier_run import MODEL

        trained = self.output_dir / MODEL
        if not trained.exists():
            if (found := checkpoint_of(str(self.output_dir))) is None:
                raise UserError(
                    f"{HERE}.save: nothing is trained in {self.output_dir}: train first"
                )
            export_checkpoint(found, target)
            return
        check_target(trained, target)
        aside = durable.aside(target)
        with durable.writing(
            aside, f"The model is in {trained}: make room, or name another folder"
        ):
            shutil.copytree(trained, aside, dirs_exist_ok=True)
            durable.publish(aside, target, replace=target.exists())


def _built(tree: dict[str, Any]) -> RunConfig:
    from dpo_fast.training.places import check_places

    check_there(tree)
    config = build_config(tree, HERE)
    check_places(config)
    return config


def _meet() -> None:
    """Several ranks find each other, where they have not yet."""
    from dpo_fast.training import distributed

    if distributed.world_size() > 1:
        distributed.init_distributed()


def _are_named(rows: Any) -> TypeGuard[Mapping[str, Rows]]:
    """Whether it is rows by their names, as trainers of transformers take them to evaluate on."""
    if not isinstance(rows, Mapping) or not rows:
        return False
    lists = [each for each in rows.values() if isinstance(each, (list, tuple))]
    return all(isinstance(row, Mapping) for each in lists for row in each[:1])  # else columns


def plain_path(value: Any) -> Any:
    """A path, or a list of them, as text."""
    return [plain_path(each) for each in value] if isinstance(value, (list, tuple)) else str(value)
