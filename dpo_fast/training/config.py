"""A whole run as typed data: checks across its sections, YAML and key=value."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError, model_validator

from dpo_fast.data.config import DataConfig
from dpo_fast.errors import UserError
from dpo_fast.models.config import ModelSection
from dpo_fast.references.config import ReferenceSection
from dpo_fast.training.sections import (
    FORBID,
    LogSection,
    LossSection,
    ParallelSection,
    TrainSection,
)


class RunConfig(BaseModel):
    """The whole run."""

    model_config = FORBID

    model: ModelSection
    data: DataConfig
    loss: LossSection = LossSection()
    reference: ReferenceSection = ReferenceSection()
    train: TrainSection
    parallel: ParallelSection = ParallelSection()
    log: LogSection = LogSection()

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        provider, names = self.reference.provider, ", ".join(self.loss.names)
        if provider == "none" and self.loss.objective.needs_reference:
            raise ValueError(
                f"reference.provider=none, but loss.type={names} compares with a reference; "
                "choose cached, frozen or adapter_off"
            )
        if provider == "adapter_off" and self.model.lora is None:
            raise ValueError(
                "reference.provider=adapter_off needs adapters: set model.lora, or choose cached"
            )
        self._check_reference()
        self._check_kl()
        self._check_offload()
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
        if self.train.merge_lora and self.model.lora is None:
            raise ValueError("train.merge_lora=true, but there are no adapters: set model.lora")
        if self.data.streaming:
            self._check_stream()
        return self

    def _check_reference(self) -> None:
        """An option that the provider does not use is a mistake."""
        used = {
            "cached": ("path", "cache_dir", "per_token"),
            "frozen": ("path",),
            "ema": ("path", "mixup_alpha", "sync_steps"),
        }
        provider = self.reference_provider
        for option in ("path", "cache_dir", "per_token", "mixup_alpha", "sync_steps"):
            value = getattr(self.reference, option)
            changed = value != ReferenceSection.model_fields[option].default
            if changed and option not in used.get(provider, ()):
                takers = [name for name, options in used.items() if option in options]
                raise ValueError(
                    f"reference.{option}={value} is not used by reference.provider={provider}; leave it "
                    f"out, or set provider={' or '.join(takers)}"
                )
        if provider == "ema" and self.model.lora is not None:
            raise ValueError(
                "reference.provider=ema mixes the weights of two models, and adapters (model.lora) are "
                "no weights of the reference; choose adapter_off or frozen"
            )
        if self.reference.old_path is not None and not self.loss.objective.needs_old_tokens:
            names = ", ".join(self.loss.names)
            raise ValueError(
                f"reference.old_path={self.reference.old_path} is not used by loss.type={names}, which "
                "does not ask what wrote the completions; leave it out"
            )
        lacking = (provider == "cached" and not self.reference.per_token) or provider == "columns"
        if lacking and self.loss.objective.needs_reference_tokens:
            raise ValueError(
                "loss.token_clamp, loss.ld_alpha and loss.grpo_beta compare with the reference token by "
                "token: set reference.per_token=true with provider=cached, or provider=frozen; or, for "
                "ld_alpha, loss.ld_reference=false to leave the reference's sums as they are"
            )

    def _check_kl(self) -> None:
        """The kl of KTO needs completions of other rows, and a reference that scores any sequence."""
        if "kl" not in self.loss.objective.statistics:
            return
        names, provider = ", ".join(self.loss.names), self.reference_provider
        if provider in ("cached", "columns") and self.loss.objective.needs_reference:
            raise ValueError(
                f"reference.provider={provider} holds the data's own sequences, and loss.type={names} "
                "estimates kl from completions after the prompts of other rows, drawn anew in every step; "
                "set reference.provider=frozen, or adapter_off with LoRA"
            )
        if self.train.global_batch_size == 1:
            raise ValueError(
                f"train.global_batch_size=1, but loss.type={names} estimates kl from the completions of other "
                "rows of the batch; set it to 2 or more"
            )

    def _check_stream(self) -> None:
        data, train = self.data, self.train
        if train.max_steps is None:
            raise ValueError(
                "data.streaming=true, but how long a stream is, is not known: set train.max_steps"
            )
        if self.reference_provider == "cached":
            raise ValueError(
                "data.streaming=true, but reference.provider=cached is computed over all of the data "
                "before training; choose frozen, or adapter_off with LoRA, or none for a loss without "
                "a reference"
            )
        if self.loss.objective.needs_old_tokens:
            raise ValueError(
                f"data.streaming=true, but loss.type={', '.join(self.loss.names)} needs the log-probs that "
                "the completions were written with, which are computed over all of the data before "
                "training; set data.streaming=false"
            )
        if self.loss.objective.grouped and train.tokens_per_batch is not None:
            raise ValueError(
                f"train.tokens_per_batch={train.tokens_per_batch} may not hold every row of a stream of "
                "groups, which have any number of completions: set train.micro_batch_size instead"
            )
        if data.stream_buffer < train.global_batch_size:
            raise ValueError(
                f"data.stream_buffer={data.stream_buffer} holds less than one step, train.global_batch_size="
                f"{train.global_batch_size}; try {100 * train.global_batch_size}"
            )
        # Nobody has seen the pairs that will come, so the largest that may come has to fit.
        sequences = 1 if data.format == "unpaired" else 2
        largest = sequences * (data.max_length - 1)
        if train.tokens_per_batch is not None and train.tokens_per_batch < largest:
            raise ValueError(
                f"train.tokens_per_batch={train.tokens_per_batch} may not hold every row of a stream: "
                f"{sequences} x data.max_length={data.max_length} take {largest} tokens; set it to "
                f"{largest} or more, or lower data.max_length"
            )

    def _check_offload(self) -> None:
        if not self.reference.offload:
            return
        if not self.has_second_model:
            raise ValueError(
                f"reference.offload=true, but with reference.provider={self.reference_provider} there "
                "is no second model to offload; choose frozen, or cached with a reference.path"
            )
        if self.parallel.zero_stage < 3:
            raise ValueError(
                "reference.offload=true needs parallel.zero_stage=3; it is "
                f"{self.parallel.zero_stage}"
            )

    @property
    def has_second_model(self) -> bool:
        """Whether a reference model is loaded beside the policy, if only to fill the cache."""
        provider, section = self.reference_provider, self.reference
        to_store = section.old_path or (provider == "cached" and section.path)
        return provider in ("frozen", "ema") or bool(to_store)

    @property
    def reference_model(self) -> ModelSection:
        """The second model's section: it has no adapters, and keeps no activations."""
        path = self.reference.path or self.model.path
        nothing = dict.fromkeys(("lora", "gradient_checkpointing", "checkpoint_layers"))
        return self.model.model_copy(update={"path": path, **nothing})

    @property
    def offloads_reference(self) -> bool:
        """Whether the second model's parameters wait in CPU memory."""
        chosen = self.reference.offload
        return self.parallel.offload_parameters if chosen is None else chosen

    @property
    def reference_provider(self) -> str:
        """By default `cached`; `none` where no loss compares with a reference; for a kl, which no stored
        one can give, `frozen`, or `adapter_off` with adapters."""
        if "provider" in self.reference.model_fields_set:
            return self.reference.provider
        if not self.loss.objective.needs_reference:
            return "none"
        if "kl" not in self.loss.objective.statistics:
            return self.reference.provider
        own = self.model.lora is not None and self.reference.path is None
        return "adapter_off" if own else "frozen"

    def resolved(self) -> dict[str, Any]:
        """As a tree that gives the same run again, with what followed from defaults filled in."""
        tree = self.model_dump(mode="json")
        tree["train"]["learning_rate"] = self.learning_rate
        tree["reference"]["provider"] = self.reference_provider
        return tree

    @property
    def learning_rate(self) -> float:
        return self.train.learning_rate or (5e-7 if self.model.lora is None else 5e-6)


def check_batch_sizes(config: RunConfig, world_size: int) -> None:
    """Raises UserError unless the global batch divides into whole micro-batches on every rank."""
    if config.train.micro_batch_size is None:  # tokens decide
        return
    unit = config.train.micro_batch_size * world_size
    if config.train.global_batch_size % unit:
        multiple = max(round(config.train.global_batch_size / unit), 1) * unit
        raise UserError(
            f"train.global_batch_size={config.train.global_batch_size} must be a multiple of micro_batch_size * "
            f"world_size = {config.train.micro_batch_size} * {world_size} = {unit}; try {multiple}"
        )


class _Loader(yaml.SafeLoader):
    """YAML of which no word is ignored: PyYAML alone lets the last of two equal keys win."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} stands twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def load_config(path: str, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """Read a YAML file and apply `section.key=value` overrides, whose values are YAML too.

    Raises:
        UserError: one paragraph that names the file, the key, its value and what was expected.
    """
    file = Path(path)
    try:
        tree = yaml.load(file.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise UserError(f"{path}: no such configuration file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected sections ({', '.join(RunConfig.model_fields)})")
    for override in overrides:
        _apply(tree, override)
    return build_config(tree, path)


def build_config(tree: dict, where: str) -> RunConfig:
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{where}: " + "; ".join(_explain(e) for e in error.errors())) from None


def _apply(tree: dict, override: str) -> None:
    key, separator, text = override.partition("=")
    names = key.split(".")
    if not separator or not all(names):
        raise UserError(f"{override!r}: expected section.key=value, like train.max_steps=100")
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        why = getattr(error, "problem", None) or "it breaks off"
        raise UserError(f"{override!r}: the value is not YAML ({why}); put it in quotes") from None
    for name in names[:-1]:
        if tree.get(name) is None:
            tree[name] = {}
        tree = tree[name]
        if not isinstance(tree, dict):
            raise UserError(f"{override!r}: {name} is not a section")
    tree[names[-1]] = value


def _explain(error: dict) -> str:
    """One of pydantic's findings in our words: the key, the value, what was expected."""
    place = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        known = _fields_at(error["loc"][:-1])
        near = difflib.get_close_matches(str(error["loc"][-1]), known, 1, 0.5)
        hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(known)}"
        return f"unknown key {place}; {hint}"
    if error["type"] == "invalid_key":
        return f"unknown key {place}; keys are names"
    if error["type"] == "missing":
        return f"{place} is missing"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return message
    return f"{place}={error['input']!r}: {message[0].lower()}{message[1:]}"


def _fields_at(location: tuple) -> list[str]:
    """Names of the fields of the section at a location."""
    model: Any = RunConfig
    for name in location:
        if name not in getattr(model, "model_fields", {}):
            break
        annotation = model.model_fields[name].annotation
        options = [annotation, *get_args(annotation)]
        model = next((x for x in options if hasattr(x, "model_fields")), model)
    return list(model.model_fields)
