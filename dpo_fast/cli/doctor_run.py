"""What one run would use, where that comes from, and why: from its configuration, without a weight."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from pydantic import BaseModel
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dpo_fast.cli.doctor_memory import Sizes, in_units, memory
from dpo_fast.losses import LOSSES
from dpo_fast.models import ScoringModel, load_tokenizer
from dpo_fast.models.config import ModelSection
from dpo_fast.models.layers import checkpointed_layers, decoder_layers
from dpo_fast.models.load import DTYPES, add_lora, load_skeleton
from dpo_fast.ops.dispatch import Choice, choose_implementation
from dpo_fast.ops.linear_logp.plan import HeadPlan, default_workspace_bytes, plan
from dpo_fast.training import distributed
from dpo_fast.training.config import RunConfig
from dpo_fast.training.engine import deepspeed_config
from dpo_fast.training.fit import Choices, check_vocabulary, choose
from dpo_fast.training.prepare import check, wants_checkpointing
from dpo_fast.training.references import old_config

GROUP = 8  # completions of a group, as long as nothing is known of the data


class Row(NamedTuple):
    """One choice: what, its value, where it comes from, and why."""

    what: str
    value: str
    origin: str
    why: str


@dataclass(frozen=True)
class Outlook:
    """What is known of a run before it begins; the models are on the meta device."""

    config: RunConfig
    choices: Choices
    policy: ScoringModel
    reference: ScoringModel | None
    old: ScoringModel | None
    head: Choice
    head_plan: HeadPlan
    scored_tokens: int
    world: int
    device: torch.device


def render_run(console: Console, config: RunConfig) -> None:
    """Print two tables: choices, memory of a rank.

    Raises:
        UserError: what `train` would say of this configuration before it loads a weight or the data.
    """
    outlook = look(config)
    table = Table("choice", "value", "from", "why", title="This run would use")
    for row in rows(outlook):
        table.add_row(*map(escape, row))
    console.print(table)
    console.print(_memory_table(outlook))


def look(config: RunConfig) -> Outlook:
    """Everything that follows from the configuration. Reads no data, joins no group, writes nothing."""
    check(config)
    train, world, device = config.train, distributed.world_size(), distributed.device()
    each = train.micro_batch_size
    deepspeed_config(config, world, train.global_batch_size // (each * world) if each else 1)
    policy = _skeleton(config.model, "model.path")
    check_vocabulary(policy, load_tokenizer(config.model))
    reference = None
    if config.reference_provider in ("frozen", "ema") or config.reference.path is not None:
        reference = _skeleton(config.reference_model, "reference.path")
    wanted, old = old_config(config), None
    if wanted not in (None, config) and wanted.reference.path is not None:
        old = _skeleton(wanted.reference_model, "reference.old_path")
    tokenizer = load_tokenizer(config.model)
    for model, option in ((reference, "reference.path"), (old, "reference.old_path")):
        if model is not None:
            check_vocabulary(model, tokenizer, option)
    dtype = DTYPES[config.model.dtype]
    head = choose_implementation("linear_logp", device, dtype, train.implementation)
    tokens = train.tokens_per_batch or _answers(config) * each * (config.data.max_length - 1)
    return Outlook(
        config,
        choose(config),
        policy,
        reference,
        old,
        head,
        _head_plan(config, policy, head.name, tokens, device),
        tokens,
        world,
        device,
    )


def _answers(config: RunConfig) -> int:
    """Sequences of a row, at most; how many a group has only the data tell."""
    if config.loss.objective.grouped:
        return GROUP
    return 1 if config.data.format == "unpaired" else 2


def _skeleton(section: ModelSection, option: str) -> ScoringModel:
    scoring = ScoringModel(load_skeleton(section, option))
    if section.lora is not None:
        with torch.device("meta"):
            add_lora(scoring, section.lora)
    return scoring


def _head_plan(config, policy: ScoringModel, implementation: str, tokens: int, device) -> HeadPlan:
    weight = policy.causal_lm.get_output_embeddings().weight
    budget = config.train.workspace_bytes
    return plan(
        tokens,
        *weight.shape,
        weight.dtype,
        needs_head=weight.requires_grad,
        workspace_bytes=default_workspace_bytes(device) if budget is None else budget,
        implementation=implementation,
    )


def rows(outlook: Outlook) -> Iterator[Row]:
    """The table, from the batch to the optimiser."""
    yield from _batch_rows(outlook)
    yield from _head_rows(outlook)
    yield from _layer_rows(outlook)
    yield _reference_row(outlook)
    yield from _old_rows(outlook)
    yield from _parallel_rows(outlook)


def origin(section: BaseModel, *options: str) -> str:
    """`option`, if the user has set one of these, else `default`."""
    return "option" if section.model_fields_set & set(options) else "default"


def _batch_rows(outlook: Outlook) -> Iterator[Row]:
    config, choices = outlook.config, outlook.choices
    train, model = config.train, config.model
    yield Row("dtype", model.dtype, origin(model, "dtype"), "of weights and activations")
    yield Row("layout", choices.layout.name, origin(train, "layout"), choices.layout.reason)
    attention = choices.attention
    yield Row("attention", attention.name, origin(model, "attention"), attention.reason)
    if outlook.reference is not None and choices.reference_attention.name != attention.name:
        other = choices.reference_attention
        yield Row("reference's attention", other.name, origin(model, "attention"), other.reason)
    unit = "groups" if config.loss.objective.grouped else "pairs"
    micro = (
        f"{train.micro_batch_size} {unit}"
        if train.tokens_per_batch is None
        else f"{train.tokens_per_batch} tokens"
    )
    why = f"{train.global_batch_size} {unit} a step over {ranks(outlook.world)}"
    yield Row("micro-batch", micro, origin(train, "micro_batch_size", "tokens_per_batch"), why)


def _head_rows(outlook: Outlook) -> Iterator[Row]:
    train = outlook.config.train
    chosen = origin(train, "implementation")
    yield Row("head", outlook.head.name, chosen, outlook.head.reason)
    loss = _preference(outlook)
    yield Row("loss", loss.name, chosen, loss.reason)
    guess = outlook.config.loss.objective.grouped and not train.tokens_per_batch
    most = f"if groups have {GROUP} completions" if guess else "at most"
    why = f"{outlook.scored_tokens} scored tokens in a micro-batch, {most}"
    yield Row("head's schedule", str(outlook.head_plan), origin(train, "workspace_bytes"), why)


def _preference(outlook: Outlook) -> Choice:
    """A loss without a kernel is composed of torch operations."""
    missing = [name for name in outlook.config.loss.names if not LOSSES[name].kernel]
    if missing:
        return Choice("torch", f"the kernel does not compute {', '.join(missing)}")
    requested = outlook.config.train.implementation
    if requested == "cuda":  # csrc has no loss
        requested = "auto"
    return choose_implementation("preference", outlook.device, torch.float32, requested)


def _layer_rows(outlook: Outlook) -> Iterator[Row]:
    model, policy = outlook.config.model, outlook.policy
    count = len(decoder_layers(policy.causal_lm))
    total = sum(p.numel() for p in policy.parameters())
    options = ("gradient_checkpointing", "checkpoint_layers")
    if wants_checkpointing(outlook.config, policy):
        chosen = checkpointed_layers(policy.causal_lm, model.checkpoint_layers)
        every = len(chosen) == count
        value = f"all {count} layers" if every else f"layer {_ranges(chosen)} of {count}"
    else:
        value = "off"
    why = f"{total:,} parameters; by default from 1e9 on"
    yield Row("activation checkpointing", value, origin(model, *options), why)
    why = "RMSNorm, RoPE and MLP" if model.use_liger_kernel else "the model's own layers"
    yield Row("liger-kernel", on(model.use_liger_kernel), origin(model, "use_liger_kernel"), why)
    why = f"blocks of {count} layers" if model.torch_compile else "layers run as they are"
    yield Row("torch.compile", on(model.torch_compile), origin(model, "torch_compile"), why)
    if model.lora is None:
        yield Row("LoRA", "off", "default", "all parameters are trained")
    else:
        trainable = sum(p.numel() for p in policy.parameters() if p.requires_grad)
        yield Row("LoRA", f"r {model.lora.r}", "option", f"{trainable:,} of {total:,} are trained")


def _ranges(indices: list[int]) -> str:
    """[0, 1, 2, 5] as 0-2, 5."""
    parts: list[list[int]] = []
    for index in indices:
        if parts and parts[-1][-1] == index - 1:
            parts[-1].append(index)
        else:
            parts.append([index])
    return ", ".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts)


def ranks(count: int) -> str:
    return f"{count} rank{'s' if count > 1 else ''}"


def on(value: bool) -> str:
    return "on" if value else "off"


def _reference_row(outlook: Outlook) -> Row:
    config = outlook.config
    provider = config.reference_provider
    why = {
        "none": "no loss compares with a reference",
        "ema": f"a second model that follows the policy, {_place(outlook)}",
        "columns": "sums that come with the data",
        "adapter_off": "the policy with its adapters off: no second copy",
        "cached": "computed once by the policy as it starts, then read from a table",
        "frozen": f"a second model, {_place(outlook)}",
    }[provider]
    if provider == "cached" and outlook.reference is not None:
        why = f"computed once by a second model, {_place(outlook)}; then read from a table"
    return Row("reference", provider, origin(config.reference, "provider"), why)


def _old_rows(outlook: Outlook) -> Iterator[Row]:
    """What the completions of groups were written with, where a loss asks."""
    config = outlook.config
    wanted = old_config(config)
    if wanted is None:
        return
    why = "computed once by the policy as it starts, then read from a table"
    if wanted == config:
        why = "the stored reference serves"
    elif wanted.reference.path is not None:
        why = f"computed once by {wanted.reference.path}, {_place(outlook)}; then read from a table"
    yield Row("old log-probs", "cached", origin(config.reference, "old_path"), why)


def _place(outlook: Outlook) -> str:
    parallel = outlook.config.parallel
    shares = (
        f"sharded over {ranks(outlook.world)}"
        if parallel.zero_stage == 3
        else "whole on every rank"
    )
    return shares + (", offloaded to CPU memory" if outlook.config.offloads_reference else "")


def _parallel_rows(outlook: Outlook) -> Iterator[Row]:
    parallel = outlook.config.parallel
    sharded = ("optimiser states", "gradients", "parameters")[: parallel.zero_stage]
    why = f"{', '.join(sharded) or 'nothing'} sharded over {ranks(outlook.world)}"
    stage = str(parallel.zero_stage)
    yield Row("ZeRO stage", stage, origin(parallel, "zero_stage"), why)
    for option, what in (("offload_optimizer", "optimiser"), ("offload_parameters", "parameters")):
        offloaded = getattr(parallel, option)
        place = "in CPU memory" if offloaded else f"on the device ({outlook.device.type})"
        yield Row(f"offload of {what}", on(offloaded), origin(parallel, option), place)


def _memory_table(outlook: Outlook) -> Table:
    lines = memory(outlook.config, _sizes(outlook), outlook.world)
    title = "Memory of a rank, roughly"
    caption = "Activations and DeepSpeed's buckets come on top."
    table = Table("what", "on the device", "in CPU memory", "how", title=title, caption=caption)
    for line in lines:
        table.add_row(line.what, in_units(line.device), in_units(line.host), line.how)
    device, host = (sum(column) for column in zip(*((line.device, line.host) for line in lines)))
    there = f"the device has {in_units(_capacity(outlook.device))}"
    table.add_row("together", in_units(device), in_units(host), there)
    return table


def _sizes(outlook: Outlook) -> Sizes:
    model = outlook.policy.causal_lm
    parts = [*decoder_layers(model), model.get_output_embeddings(), model.get_input_embeddings()]
    return Sizes(
        parameters=_elements(outlook.policy),
        trainable=sum(p.numel() for p in outlook.policy.parameters() if p.requires_grad),
        gathered=max(_elements(part) for part in parts),
        reference=0 if outlook.reference is None else _elements(outlook.reference),
        head_bytes=outlook.head_plan.bytes,
        old=0 if outlook.old is None else _elements(outlook.old),
    )


def _elements(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _capacity(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
