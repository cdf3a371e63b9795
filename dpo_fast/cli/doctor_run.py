"""What one run would use, where that comes from, and why: from its configuration, without a weight."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from pydantic import BaseModel
from rich.markup import escape
from rich.table import Table

from dpo_fast.cli.doctor_images import image_processing
from dpo_fast.cli.doctor_layouts import model_tables
from dpo_fast.cli.doctor_traffic import traffic_table, when_they_pay
from dpo_fast.models import ScoringModel, load_tokenizer
from dpo_fast.models.architecture import Architecture, architecture_of
from dpo_fast.models.fp8 import fp8_layers
from dpo_fast.models.layer_kinds import ranges
from dpo_fast.models.layers import checkpointed_layers, decoder_layers
from dpo_fast.models.skeleton import scoring_skeleton
from dpo_fast.ops.dispatch import Choice, choose_implementation
from dpo_fast.ops.linear_logp.plan import HeadPlan
from dpo_fast.references import ReferenceModel
from dpo_fast.training import distributed
from dpo_fast.training.config import RunConfig
from dpo_fast.training.engine import deepspeed_config
from dpo_fast.training.fit import Choices, check_run, check_vocabulary
from dpo_fast.training.memory import (
    GROUP,
    Line,
    Sizes,
    elements,
    head_plan,
    in_units,
    scored_tokens,
    sizes_of,
)
from dpo_fast.training.memory_plan import Machine, Uncounted, activations_of, lines_of
from dpo_fast.training.optimisers import OPTIMISERS
from dpo_fast.training.prepare import wants_checkpointing
from dpo_fast.training.zero import choose_stage

CAPTION = (
    "Activations are those of the largest micro-batch, by the model's own code. "
    "dpo-fast doctor CONFIG --plan tries options until it fits."
)


class Decision(NamedTuple):
    """One line of the table: what is decided, its value, where that comes from, and why."""

    what: str
    value: str
    origin: str
    why: str


@dataclass(frozen=True)
class Outlook:
    """What is known of a run before it begins. All models are on the meta device.

    second_models: those that are loaded beside the policy.
    head, head_plan: the implementation of the head, and its schedule for a micro-batch.
    scored_tokens: of a micro-batch, at most.
    world: ranks.
    """

    config: RunConfig
    choices: Choices
    policy: ScoringModel
    second_models: dict[ReferenceModel, ScoringModel]
    head: Choice
    head_plan: HeadPlan
    scored_tokens: int
    world: int
    device: torch.device

    @property
    def sizes(self) -> Sizes:
        """What the models and the head take."""
        quantised = self.config.model.quantization
        return sizes_of(self.policy, self.second_models, self.head_plan.bytes, quantised)

    def memory(self, machine: Machine) -> tuple[list[Line], str]:
        """The lines of the table of memory, and what stands below it."""
        why = CAPTION
        try:
            activations = activations_of(self.config, self.choices, self.policy, machine)
        except Uncounted as error:
            activations, why = (
                None,
                f"Activations come on top: they could not be counted ({error}).",
            )
        models = self.policy, self.second_models
        lines = lines_of(self.config, *models, machine, self.world, activations, self.choices)
        return lines, why


def tables_of(outlook: Outlook, machine: Machine | None = None) -> dict[str, Table]:
    """Choices, layouts, memory of a rank and what several ranks exchange, by the names of `--json`.

    machine: what memory is counted for; by default this one.
    """
    machine = machine or Machine.here(outlook.config)
    table = Table("choice", "value", "from", "why", title="This run would use")
    for decision in decisions(outlook):
        table.add_row(*map(escape, decision))
    tables = {"run": table} | model_tables(models_of(outlook))
    tables["memory"] = memory_table(*outlook.memory(machine), machine)
    if outlook.world > 1:
        tables["communication"] = traffic_table(outlook)
    return tables


def models_of(outlook: Outlook) -> dict[str, Architecture]:
    """The architecture of each model, by the option that names it."""
    seconds = {each.named_by: model for each, model in outlook.second_models.items()}
    models = {"model.path": outlook.policy} | seconds
    return {option: architecture_of(model.causal_lm) for option, model in models.items()}


def look(config: RunConfig) -> Outlook:
    """Everything that follows from the configuration. Reads no data, joins no group, writes nothing.

    Raises:
        UserError: what `train` would say of this configuration before it loads a weight or the data.
    """
    choices = check_run(config)
    train, world, device = config.train, distributed.world_size(), distributed.device()
    each = train.micro_batch_size
    ranks_of_data = config.data_ranks
    accumulation = train.global_batch_size // (each * ranks_of_data) if each else 1
    deepspeed_config(config, world, accumulation)
    tokenizer = load_tokenizer(config.model)
    policy = scoring_skeleton(config.model)
    check_vocabulary(policy, tokenizer)
    second_models = {}
    for model in config.second_models:
        second_models[model] = scoring_skeleton(model.section(config.model), model.named_by)
        check_vocabulary(second_models[model], tokenizer, model.named_by)
    dtype = config.model.torch_dtype
    head = choose_implementation("linear_logp", device, dtype, train.implementation)
    return Outlook(
        config=config,
        choices=choices,
        policy=policy,
        second_models=second_models,
        head=head,
        head_plan=head_plan(config, policy, head.name, device),
        scored_tokens=scored_tokens(config),
        world=world,
        device=device,
    )


def _unit(config: RunConfig) -> str:
    """What the examples are, as far as the configuration says."""
    if config.loss.objective.grouped:
        return "groups"
    if config.data.only_single:
        return "demonstrations" if config.data.formats == {"sft"} else "completions"
    return "pairs" if config.loss.objective.paired else "examples"


def decisions(outlook: Outlook) -> Iterator[Decision]:
    """What is decided, from the batch to the optimiser."""
    yield from _batch_rows(outlook)
    yield from _head_rows(outlook)
    yield from _layer_rows(outlook)
    yield _reference_row(outlook)
    yield from _old_rows(outlook)
    yield from _parallel_rows(outlook)


def origin(section: BaseModel, *options: str) -> str:
    """`option`, if the user has set one of these, else `default`."""
    return "option" if section.model_fields_set & set(options) else "default"


def _batch_rows(outlook: Outlook) -> Iterator[Decision]:
    config, choices = outlook.config, outlook.choices
    train, model = config.train, config.model
    yield Decision("dtype", choices.dtype.name, origin(model, "dtype"), choices.dtype.reason)
    yield Decision("layout", choices.layout.name, origin(train, "layout"), choices.layout.reason)
    attention = choices.attention
    yield Decision("attention", attention.name, origin(model, "attention"), attention.reason)
    for second in outlook.second_models:
        other = choices.attention_of(second)
        if other.name != attention.name:
            what = f"attention of {second.named_by}"
            yield Decision(what, other.name, origin(model, "attention"), other.reason)
    unit, tokens = _unit(config), train.tokens_per_batch
    micro = f"{train.micro_batch_size} {unit}" if tokens is None else f"{tokens} tokens"
    why = f"{train.global_batch_size} {unit} a step over {ranks(outlook.world)}"
    yield Decision("micro-batch", micro, origin(train, "micro_batch_size", "tokens_per_batch"), why)
    if (images := image_processing(config)) is not None:
        chosen = origin(config.data, "images_kwargs")
        yield Decision("images", images.name, chosen, images.reason)


def _head_rows(outlook: Outlook) -> Iterator[Decision]:
    train = outlook.config.train
    chosen = origin(train, "implementation")
    yield Decision("head", outlook.head.name, chosen, outlook.head.reason)
    loss = _preference(outlook)
    yield Decision("loss", loss.name, chosen, loss.reason)
    guess = outlook.config.loss.objective.grouped and not train.tokens_per_batch
    most = f"if groups have {GROUP} completions" if guess else "at most"
    why = f"{outlook.scored_tokens} scored tokens in a micro-batch, {most}"
    yield Decision("head's plan", str(outlook.head_plan), origin(train, "workspace_bytes"), why)


def _preference(outlook: Outlook) -> Choice:
    """What computes the loss: the kernel if there is one for all losses, else torch operations."""
    missing = [spec.name for spec in outlook.config.loss.objective.specs if not spec.kernel]
    if missing:
        return Choice("torch", f"the kernel does not compute {', '.join(missing)}")
    requested = outlook.config.train.implementation
    if requested == "cuda":  # csrc has no loss
        requested = "auto"
    return choose_implementation("preference", outlook.device, torch.float32, requested)


def _layer_rows(outlook: Outlook) -> Iterator[Decision]:
    model, policy = outlook.config.model, outlook.policy
    layers, total = len(decoder_layers(policy.causal_lm)), elements(policy)
    yield _checkpointing_row(outlook, layers, total)
    why = "RMSNorm, RoPE and MLP" if model.use_liger_kernel else "the model's own layers"
    yield Decision(
        "liger-kernel", on(model.use_liger_kernel), origin(model, "use_liger_kernel"), why
    )
    why = f"blocks of {layers} layers" if model.torch_compile else "layers run as they are"
    yield Decision("torch.compile", on(model.torch_compile), origin(model, "torch_compile"), why)
    if model.fp8:
        count = len(fp8_layers(policy.causal_lm))
        why = f"products of {count} linear layers of the decoder; head and log-probs as they are"
        yield Decision("fp8", model.fp8, origin(model, "fp8"), why)
    if (optim := outlook.config.train.optim) != "auto":
        yield Decision("optimiser", optim, "option", OPTIMISERS[optim].meaning)
    why = f"{elements(policy, trainable=True):,} of {total:,} are trained"
    if model.lora is not None:
        yield Decision("LoRA", f"r {model.lora.r}", "option", why)
    elif model.has_adapters:
        yield Decision(
            "LoRA", "goes on", origin(model, "adapter"), f"model.path is an adapter: {why}"
        )
    else:
        yield Decision("LoRA", "off", "default", "all parameters are trained")
    if model.quantization is not None:
        bits, why = (
            model.quantization.bits,
            "layers of the decoder; not the head, embeddings, experts",
        )
        yield Decision("quantisation", f"{bits} bits", "option", why)


def _checkpointing_row(outlook: Outlook, layers: int, total: int) -> Decision:
    model, value = outlook.config.model, "off"
    if wants_checkpointing(outlook.config, outlook.policy):
        chosen = checkpointed_layers(outlook.policy.causal_lm, model.checkpoint_layers)
        every = len(chosen) == layers
        value = f"all {layers} layers" if every else f"layer {ranges(chosen)} of {layers}"
    options = ("gradient_checkpointing", "checkpoint_layers")
    why = f"{total:,} parameters; by default from 1e9 on"
    return Decision("activation checkpointing", value, origin(model, *options), why)


def ranks(count: int) -> str:
    return f"{count} rank{'s' if count > 1 else ''}"


def on(value: bool) -> str:
    return "on" if value else "off"


def _reference_row(outlook: Outlook) -> Decision:
    spec, model = outlook.config.reference_spec, outlook.config.reference.model
    why = spec.meaning
    if spec.stores:
        why = _stored_by(outlook, model)
    elif model in outlook.second_models:
        why = f"{spec.meaning}, {_place(outlook)}"
    return Decision("reference", spec.name, origin(outlook.config.reference, "provider"), why)


def _old_rows(outlook: Outlook) -> Iterator[Decision]:
    """The log-probs under the model that wrote the completions, if a loss asks for them."""
    config = outlook.config
    model = config.old_model
    if model is not None:
        same = model == config.reference.model
        why = "the stored reference serves" if same else _stored_by(outlook, model)
        yield Decision("old log-probs", "stored", origin(config.reference, "old_path"), why)


def _stored_by(outlook: Outlook, model: ReferenceModel) -> str:
    """Which model computes what is stored."""
    who = "the policy as it starts"
    if model.path is not None:
        who = f"a second model ({model.option}={model.path}), {_place(outlook)}"
    return f"computed once by {who}; then read from a table"


def _place(outlook: Outlook) -> str:
    """Where a second model's parameters are."""
    sharded = outlook.config.zero_stage == 3
    place = f"sharded over {ranks(outlook.world)}" if sharded else "whole on every rank"
    return place + (", offloaded to CPU memory" if outlook.config.offloads_reference else "")


def _parallel_rows(outlook: Outlook) -> Iterator[Decision]:
    parallel = outlook.config.parallel
    stage = choose_stage(outlook.config, outlook.world)
    sharded = ("optimiser states", "gradients", "parameters")[: int(stage.name)]
    why = f"{', '.join(sharded) or 'nothing'} sharded over {ranks(outlook.world)}: {stage.reason}"
    yield Decision("ZeRO stage", stage.name, origin(parallel, "zero_stage"), why)
    shared = parallel.sequence_parallel
    why = "every rank has all tokens of its micro-batches"
    if shared > 1:
        why = f"{shared} ranks have a slice of a micro-batch each, in attention 1/{shared} of the heads"
    value = f"{shared} ranks" if shared > 1 else "off"
    yield Decision("sequence parallelism", value, origin(parallel, "sequence_parallel"), why)
    for option, what in (("offload_optimizer", "optimiser"), ("offload_parameters", "parameters")):
        offloaded = getattr(parallel, option)
        place = "in CPU memory" if offloaded else f"on the device ({outlook.device.type})"
        if offloaded == "nvme":
            place = f"in files below {parallel.nvme_path}"
        yield Decision(f"offload of {what}", on(bool(offloaded)), origin(parallel, option), place)
    for name, option, value, why in when_they_pay(outlook):
        yield Decision(name, value, origin(parallel, option), why)


def memory_table(lines: list[Line], caption: str, machine: Machine) -> Table:
    """The lines and their sum, beside what the device has."""
    title = "Memory of a rank, roughly"
    table = Table("what", "on the device", "in CPU memory", "how", title=title, caption=caption)
    for line in lines:
        table.add_row(line.what, in_units(line.device), in_units(line.host), line.how)
    on_device, host = (sum(column) for column in zip(*((x.device, x.host) for x in lines)))
    there = f"{machine.name} has {in_units(machine.capacity)}"
    table.add_row("together", in_units(on_device), in_units(host), there)
    return table
