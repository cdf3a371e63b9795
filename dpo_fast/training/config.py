"""A whole run as typed data: its sections, checks across them, and how a tree becomes one."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError, model_validator

from dpo_fast.data.config import DataConfig
from dpo_fast.errors import UserError
from dpo_fast.models.config import ModelSection
from dpo_fast.references.config import ReferenceModel, ReferenceSection, check_reference
from dpo_fast.references.table import ProviderSpec, alternatives, default_provider, spec_of
from dpo_fast.training.config_file import read_tree
from dpo_fast.training.config_types import check_types
from dpo_fast.training.generate_section import GenerateSection, check_generate
from dpo_fast.training.health_section import HealthSection, check_stop_on
from dpo_fast.training.log_section import LogSection
from dpo_fast.training.parallel_section import ParallelSection
from dpo_fast.training.schedule import check_schedule
from dpo_fast.training.sections import FORBID, MICRO_BATCH, LossSection, TrainSection
from dpo_fast.training.selection import check_selection
from dpo_fast.wording import clipped, quoted

MOST_FAULTS, MOST_OF_A_FAULT = 10, 1000  # of one configuration, and characters of one

Config = TypeVar("Config", bound=BaseModel)

# Keys that people know from elsewhere, and where they stand here.
ELSEWHERE = dict.fromkeys(("router_aux_loss_coef", "aux_loss_coef"), "model.router_aux_loss_coef")
ELSEWHERE |= {"output_router_logits": "model.output_router_logits"}


class RunConfig(BaseModel):
    """A run: one section for each part of it. Options that do not go together are refused."""

    model_config = FORBID

    model: ModelSection
    data: DataConfig
    loss: LossSection = LossSection()
    reference: ReferenceSection = ReferenceSection()
    train: TrainSection
    parallel: ParallelSection = ParallelSection()
    log: LogSection = LogSection()
    health: HealthSection = HealthSection()
    generate: GenerateSection = GenerateSection()

    if TYPE_CHECKING:  # a dict is a section, too

        def __init__(
            self,
            *,
            model: ModelSection | Mapping[str, Any],
            data: DataConfig | Mapping[str, Any],
            train: TrainSection | Mapping[str, Any],
            loss: LossSection | Mapping[str, Any] = ...,
            reference: ReferenceSection | Mapping[str, Any] = ...,
            parallel: ParallelSection | Mapping[str, Any] = ...,
            log: LogSection | Mapping[str, Any] = ...,
            health: HealthSection | Mapping[str, Any] = ...,
            generate: GenerateSection | Mapping[str, Any] = ...,
        ) -> None: ...

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        adapters = self.model.has_adapters
        check_reference(self.reference, self.reference_spec, self.loss.objective, adapters)
        self._check_biases()
        self._check_kl()
        self._check_offload()
        self._check_training()
        if self.data.streaming:
            self._check_stream()
            self._check_buffer()
        if self.health.stop_on:
            has_eval = self.data.has_eval
            check_stop_on(self.health, self.reference_spec, self.resolved(), has_eval)
        if self.generate.max_prompts:
            check_generate(self.generate, self)
        return self

    def _check_biases(self) -> None:
        """Biases lie in the base model, so that the reference has those that are trained."""
        lora = self.model.lora
        if lora is not None and lora.trains_biases and self.reference_spec.needs_adapters:
            others = alternatives(
                lambda spec: spec.compares and not spec.needs_adapters and not spec.follows
            )
            raise ValueError(
                f"model.lora.bias={lora.bias} trains biases of the base model, which the model with its "
                f"adapters off (reference.provider={self.reference_provider}) would have as well; set "
                f"model.lora.bias=none, or choose {others}"
            )

    def _check_kl(self) -> None:
        """The kl of KTO needs completions of other rows."""
        if "kl" in self.loss.objective.statistics and self.train.global_batch_size == 1:
            raise ValueError(
                f"train.global_batch_size=1, but loss.type={self._losses} estimates kl from the "
                "completions of other rows of the batch; set it to 2 or more"
            )

    def _check_offload(self) -> None:
        if self.parallel.offload_parameters == "nvme" and self.reference_spec.follows:
            raise ValueError(
                f"parallel.offload_parameters=nvme, but reference.provider={self.reference_provider} "
                "follows the parameters in memory; set parallel.offload_parameters=cpu"
            )
        if not self.reference.offload:
            return
        if not self.second_models:
            always = alternatives(lambda spec: spec.second_model == "always")
            by_path = alternatives(lambda spec: spec.second_model == "path")
            raise ValueError(
                f"reference.offload=true, but with reference.provider={self.reference_provider} there "
                f"is no second model to offload; choose {always}, or {by_path} with a reference.path"
            )
        if self.parallel.zero_stage not in ("auto", 3):
            raise ValueError(
                "reference.offload=true needs parallel.zero_stage=3; it is "
                f"{self.parallel.zero_stage}"
            )

    def _check_training(self) -> None:
        if self.model.torch_compile and self.parallel.zero_stage == 3:
            raise ValueError(
                "model.torch_compile=true cannot be honoured with parallel.zero_stage=3: DeepSpeed "
                "gathers parameters inside every layer, which breaks the compiled graphs up; set "
                "parallel.zero_stage=2 or less, or model.use_liger_kernel=true instead"
            )
        if self.train.eval_steps is not None and not self.data.has_eval:
            raise ValueError(
                f"train.eval_steps={self.train.eval_steps}, but there is nothing to evaluate on: set "
                "data.eval or data.eval_rows"
            )
        self._check_whole_weights()
        if self.log.log_completions and not self.generate.max_prompts:
            raise ValueError(
                "log.log_completions=true, but no answers are written: set generate.max_prompts, or "
                "remove it"
            )
        objective, tokens = self.loss.objective, self.log.token_metrics
        check_selection(self.train, self.generate, self.data.has_eval, objective, tokens)
        check_schedule(self.train.schedule, self.learning_rate, self.train.max_steps)
        if self.train.merge_dtype != "auto" and not self.train.merge_lora:
            raise ValueError(
                f"train.merge_dtype={self.train.merge_dtype} is not used: set train.merge_lora=true, or "
                "remove it"
            )
        if self.train.merge_lora and not self.model.has_adapters:
            raise ValueError("train.merge_lora=true, but there are no adapters: set model.lora")

    def _check_whole_weights(self) -> None:
        option, parallel = self.model.whole_weights, self.parallel
        sharded = parallel.zero_stage == 3 and "parallel.zero_stage=3"
        sharded = sharded or (parallel.needs_stage_3 and f"parallel.{parallel.needs_stage_3}")
        if parallel.offload_parameters:
            sharded = f"parallel.offload_parameters={parallel.offload_parameters}"
        if option and sharded:
            raise ValueError(
                f"{option} cannot be honoured with {sharded}, which shards every weight over the ranks; "
                "set parallel.zero_stage=2 or less"
            )

    def _check_stream(self) -> None:
        """A stream has no known length, and nothing can be computed over all of it."""
        if self.train.max_steps is None:
            raise ValueError(
                "data.streaming=true, but the length of a stream is not known: set train.max_steps"
            )
        if self.train.sampler is not None:
            raise ValueError(
                f"data.streaming=true, but train.sampler={self.train.sampler} orders all of the data: set "
                "data.streaming=false, or remove the sampler"
            )
        if self.reference_spec.stores:
            others = alternatives(lambda spec: spec.compares and not spec.stores)
            nothing = alternatives(lambda spec: not spec.compares)
            raise ValueError(
                f"data.streaming=true, but reference.provider={self.reference_provider} is computed over "
                f"all of the data before training; choose {others}, or {nothing} for a loss without a "
                "reference"
            )
        if self.loss.objective.needs_old_tokens:
            raise ValueError(
                f"data.streaming=true, but loss.type={self._losses} needs the log-probs that the "
                "completions were written with, which are computed over all of the data before "
                "training; set data.streaming=false"
            )

    def _check_buffer(self) -> None:
        """A stream's buffer holds a step, and a micro-batch holds the largest row that may come."""
        data, train = self.data, self.train
        if self.loss.objective.grouped and train.tokens_per_batch is not None:
            raise ValueError(
                f"train.tokens_per_batch={train.tokens_per_batch} may not hold every row of a stream of "
                "groups, which have any number of completions: set train.micro_batch_size instead"
            )
        if data.stream_buffer < train.global_batch_size:
            raise ValueError(
                f"data.stream_buffer={data.stream_buffer} holds less than one step, "
                f"train.global_batch_size={train.global_batch_size}; try {100 * train.global_batch_size}"
            )
        sequences = 1 if data.only_single else 2
        largest = sequences * (data.max_length - 1)
        if train.tokens_per_batch is not None and train.tokens_per_batch < largest:
            raise ValueError(
                f"train.tokens_per_batch={train.tokens_per_batch} may not hold every row of a stream: "
                f"{sequences} x data.max_length={data.max_length} take {largest} tokens; set it to "
                f"{largest} or more, or lower data.max_length"
            )

    @property
    def _losses(self) -> str:
        return ", ".join(self.loss.names)

    @property
    def zero_stage(self) -> int:
        """parallel.zero_stage, or what `auto` means for the ranks of this run."""
        from dpo_fast.training import distributed
        from dpo_fast.training.zero import choose_stage

        return int(choose_stage(self, distributed.world_size()).name)

    @property
    def data_ranks(self) -> int:
        """Ranks of this run that have a batch of their own; parallel.sequence_parallel share one."""
        from dpo_fast.training import distributed

        return distributed.world_size() // self.parallel.sequence_parallel

    @property
    def run_name(self) -> str:
        """log.run_name, or the name of the output folder."""
        return self.log.run_name or Path(self.train.output_dir).resolve().name

    @property
    def reference_provider(self) -> str:
        """The provider that is named, or the default for these losses (`default_provider`)."""
        if "provider" in self.reference.model_fields_set:
            return self.reference.provider
        objective = self.loss.objective
        return default_provider(
            compares=objective.needs_reference,
            any_sequence="kl" in objective.statistics,
            adapters=self.model.has_adapters and self.reference.path is None,
        )

    @property
    def reference_spec(self) -> ProviderSpec:
        """The entry of the provider in the table."""
        return spec_of(self.reference_provider, self.model.has_adapters)

    @property
    def old_model(self) -> ReferenceModel | None:
        """The model that wrote the completions. None if no loss asks for it."""
        return self.reference.old_model if self.loss.objective.needs_old_tokens else None

    @property
    def stored_models(self) -> list[ReferenceModel]:
        """The models whose log-probs are computed before training and stored, each once."""
        own = [self.reference.model] if self.reference_spec.stores else []
        old = [] if self.old_model is None else [self.old_model]
        return list(dict.fromkeys(own + old))

    @property
    def second_models(self) -> list[ReferenceModel]:
        """The models that are loaded beside the policy, if only to fill a store."""
        own = self.reference.model
        found = [own] if self.reference_spec.loads_second_model(own.path) else []
        if self.old_model is not None and self.old_model.path is not None:
            found.append(self.old_model)
        return list(dict.fromkeys(found))

    @property
    def offloads_reference(self) -> bool:
        """Whether the second model's parameters wait in CPU memory."""
        chosen = self.reference.offload
        return bool(self.parallel.offload_parameters) if chosen is None else chosen

    def resolved(self) -> dict[str, Any]:
        """The run as a tree from which it can be built again. Derived defaults stand in it."""
        tree = self.model_dump(mode="json")
        tree["train"]["learning_rate"] = self.learning_rate
        tree["reference"]["provider"] = self.reference_provider
        if self.generate.judge is not None:  # options of other judges are refused, defaults too
            judge = self.generate.judge.model_dump(mode="json", exclude_unset=True)
            tree["generate"]["judge"] = judge
        return tree

    @property
    def learning_rate(self) -> float:
        """Peak learning rate; whole models and adapters have different defaults, and so has SFT."""
        if self.train.learning_rate:
            return self.train.learning_rate
        whole, adapters = (2e-5, 2e-4) if self.loss.objective.learns else (5e-7, 5e-6)
        return adapters if self.model.has_adapters else whole


def check_batch_sizes(config: RunConfig, world_size: int) -> None:
    """Raises UserError unless the global batch divides into whole micro-batches on every data rank.

    A micro-batch that nobody chose is made to: the largest of at most `MICRO_BATCH` that does.
    """
    shared = config.parallel.sequence_parallel
    if world_size % shared:
        raise UserError(
            f"parallel.sequence_parallel={shared} does not divide the {world_size} "
            f"rank{'s' if world_size > 1 else ''} of this run: start a multiple of {shared} ranks "
            f"(--nproc), or set it to {'a divisor of ' if world_size > 1 else ''}{world_size}"
        )
    train = config.train
    if train.micro_batch_size is None:  # tokens decide
        return
    ranks = world_size // shared
    if "micro_batch_size" not in train.model_fields_set:
        train.micro_batch_size = _largest_part(train.global_batch_size // ranks)
        train.model_fields_set.discard("micro_batch_size")
    micro = train.micro_batch_size
    unit, world = micro * ranks, f"world_size = {micro} * {world_size}"
    if shared > 1:
        world = f"world_size / sequence_parallel = {micro} * {world_size} / {shared}"
    if train.global_batch_size % unit:
        multiple = max(round(train.global_batch_size / unit), 1) * unit
        raise UserError(
            f"train.global_batch_size={train.global_batch_size} must be a multiple of "
            f"micro_batch_size * {world} = {unit}; try {multiple}"
        )


def _largest_part(examples: int) -> int:
    """The largest divisor of the examples of a rank that a micro-batch holds by default; 1 of none."""
    return max(n for n in range(1, MICRO_BATCH + 1) if examples % n == 0 or n == 1)


def load_config(path: str, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """The run of a YAML file with `section.key=value` overrides, whose values are YAML too.

    Raises:
        UserError: one paragraph that names the file, the key, its value and what was expected.
    """
    return build_config(read_tree(path, overrides), path)


def build_config(tree: dict, where: str) -> RunConfig:
    """Validate the tree of a run. Raises UserError, which begins with `where`."""
    if stages := [name for name in ("stages", "sample") if name in tree]:
        raise UserError(
            f"{where} has a section {stages[0]}: it is a file for dpo-fast iterate, sample and judge "
            "(docs/ROUNDS.md), and no run's"
        )
    return build(RunConfig, tree, where)


def build(kind: type[Config], tree: dict, where: str) -> Config:
    """Validate a tree as a configuration of any kind.

    where: what an error says first, such as the file's name.

    Raises:
        UserError: one paragraph that names the keys, their values and what was expected.
    """
    check_types(tree, kind, where)
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        told = [_explain(each, kind) for each in error.errors()[:MOST_FAULTS]]
        raise UserError(
            f"{where}: " + "; ".join(clipped(x, MOST_OF_A_FAULT) for x in told)
        ) from None


def _explain(error: dict, kind: type[BaseModel]) -> str:
    """One of pydantic's errors as the key, the value and what was expected."""
    place = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        if error["loc"][-1] in ELSEWHERE:
            return f"unknown key {place}; did you mean {ELSEWHERE[error['loc'][-1]]}?"
        known = _fields_at(error["loc"][:-1], kind)
        near = difflib.get_close_matches(str(error["loc"][-1]), known, 1, 0.5)
        hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(known)}"
        return f"unknown key {place}; {hint}"
    if error["type"] == "invalid_key":
        return f"unknown key {place}; keys are names"
    if error["type"] == "missing":
        return f"{place} is missing"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "model_type":
        keys = ", ".join(_fields_at(error["loc"], kind))
        told = f"{place}={quoted(error['input'])}: expected a section, with any of the keys {keys}"
        short = {"loss": "type", "model": "path", "data": "train"}.get(place)
        if short and isinstance(error["input"], str):
            return f"{place}={quoted(error['input'])}: write {place}: {{{short}: {error['input']}}}"
        return told
    if error["type"] == "value_error":
        return f"{place}: {message}" if any(isinstance(x, int) for x in error["loc"]) else message
    return f"{place}={quoted(error['input'])}: {message[0].lower()}{message[1:]}"


def _fields_at(location: tuple, kind: type[BaseModel]) -> list[str]:
    """Names of the fields of the section at a location."""
    model: Any = kind
    for name in location:
        if isinstance(name, int):  # an item of a list, whose type is known by now
            continue
        if name not in getattr(model, "model_fields", {}):
            break
        annotation = model.model_fields[name].annotation
        options = [annotation, *get_args(annotation)]
        model = next((x for x in options if hasattr(x, "model_fields")), model)
    return list(model.model_fields)
