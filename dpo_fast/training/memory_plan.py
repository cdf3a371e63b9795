"""Which options make a run fit into a device's memory: from its configuration, without a weight."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from dpo_fast.data.layouts import LAYOUTS
from dpo_fast.models import ScoringModel
from dpo_fast.models.architecture import architecture_of
from dpo_fast.models.attention import NAMES
from dpo_fast.models.config import LoraSection
from dpo_fast.models.skeleton import scoring_skeleton
from dpo_fast.models.tiles import why_not_tiles
from dpo_fast.ops.dispatch import choose_implementation
from dpo_fast.ops.linear_logp.plan import HeadPlan, default_workspace_bytes
from dpo_fast.training import distributed
from dpo_fast.training.activations import Activations, Shape, count
from dpo_fast.training.config import RunConfig
from dpo_fast.training.engine import deepspeed_config
from dpo_fast.training.fit import Choices
from dpo_fast.training.image_memory import image_lines
from dpo_fast.training.memory import (
    Line,
    answers,
    head_plan,
    mask_line,
    memory,
    scored_tokens,
    sizes_of,
)
from dpo_fast.training.prepare import wants_checkpointing

BUCKET = 500_000_000  # DeepSpeed's reduce_bucket_size, in elements
LORA_RANK = 16
USABLE = (
    0.94  # of a device's memory; its driver, communication and holes between tensors take the rest
)


@dataclass(frozen=True)
class Machine:
    """The device that memory is counted for.

    capacity: its bytes.
    on_cpu: it is a CPU.
    head: the implementation of the head.
    workspace: bytes that the head may keep by default.
    """

    capacity: int
    on_cpu: bool
    head: str
    workspace: int

    @classmethod
    def here(cls, config: RunConfig) -> Machine:
        device, dtype = distributed.device(), config.model.torch_dtype
        head = choose_implementation("linear_logp", device, dtype, config.train.implementation)
        workspace = default_workspace_bytes(device)
        return cls(distributed.capacity(device), device.type == "cpu", head.name, workspace)

    @classmethod
    def gpu(cls, capacity: int) -> Machine:
        """A GPU of so many bytes that need not be here."""
        return cls(capacity, False, "triton", capacity // 16)

    @property
    def name(self) -> str:
        return "a CPU" if self.on_cpu else "a GPU"

    def head_plan(self, config: RunConfig, policy: ScoringModel) -> HeadPlan:
        return head_plan(
            config, policy, self.head, torch.device("cpu"), workspace_bytes=self.workspace
        )


def shape_of(config: RunConfig, layout: str, on_cpu: bool, attention: str = "sdpa") -> Shape:
    """The largest micro-batch: sequences of data.max_length that share nothing, or tokens_per_batch.

    The last token of a sequence does not reach the backbone. Ranks that share it have a part each.

    attention: what transformers is given for the policy.
    """
    longest, tokens = config.data.max_length - 1, config.train.tokens_per_batch
    sequences = answers(config) * (config.train.micro_batch_size or 1)
    if tokens is not None:
        longest = min(longest, -(-tokens // sequences))
        sequences = -(-tokens // longest)
    scored, ranks = scored_tokens(config), config.parallel.sequence_parallel
    if ranks > 1:  # a slice of one row: attention has fewer heads, and as many numbers
        return Shape(1, -(-sequences * longest // ranks), True, -(-scored // ranks), on_cpu)
    in_one_row = LAYOUTS[layout].shares_rows
    return Shape(sequences, longest, in_one_row, scored, on_cpu, attention == "eager")


class Uncounted(Exception):
    """A model whose code does not run without numbers."""


def activations_of(
    config: RunConfig, choices: Choices, policy: ScoringModel, machine: Machine
) -> Activations:
    """The activations of the largest micro-batch. Raises Uncounted."""
    model = config.model
    try:
        return count(
            lambda: scoring_skeleton(model),
            shape_of(config, choices.layout.name, machine.on_cpu, choices.attention.name),
            machine.head_plan(config, policy),
            recomputed=wants_checkpointing(config, policy),
            layers=model.checkpoint_layers,
            offload=model.activation_offloading and not machine.on_cpu,
            tile_tokens=model.tile_tokens,
        )
    except Exception as error:  # code of any model, and meta tensors
        raise Uncounted(f"{type(error).__name__}: {str(error).splitlines()[0][:100]}") from error


def lines_of(
    config: RunConfig,
    policy: ScoringModel,
    second_models: dict,
    machine: Machine,
    ranks: int,
    activations: Activations | None,
    choices: Choices,
) -> list[Line]:
    """Memory of a rank, line by line."""
    zero = deepspeed_config(config, ranks, 1)["zero_optimization"]
    sizes = sizes_of(
        policy,
        second_models,
        machine.head_plan(config, policy).bytes,
        config.model.quantization,
        activations=activations,
        bucket=int(zero.get("reduce_bucket_size", BUCKET)),
        on_cpu=machine.on_cpu,
    )
    shape = shape_of(config, choices.layout.name, machine.on_cpu, choices.attention.name)
    shape = replace(shape, eager=shape.eager and activations is not None)
    images = image_lines(config, policy, wants_checkpointing(config, policy))
    return [*memory(config, sizes, ranks), *mask_line(config, shape), *images]


class Rung(NamedTuple):
    """One set of options.

    options: added to the configuration, by key.
    device, host: bytes.
    fits: into the device.
    """

    options: dict[str, Any]
    device: float
    host: float
    fits: bool


def plan(
    config: RunConfig, choices: Choices, second_models: dict, machine: Machine, ranks: int
) -> Iterator[Rung]:
    """What the run takes as it is, and with more and more options, those that cost the least time first.

    Ends behind the first that fits. Raises Uncounted.
    """
    fits = False
    skeleton = functools.cache(lambda lora: scoring_skeleton(_with_lora(config, lora).model))
    for options, changed in _ladder(config, skeleton(False), ranks):
        policy = skeleton("model.lora.r" in options)
        activations = activations_of(changed, choices, policy, machine)
        lines = lines_of(changed, policy, second_models, machine, ranks, activations, choices)
        device, host = (sum(column) for column in zip(*((x.device, x.host) for x in lines)))
        fits = device <= machine.capacity * USABLE
        yield Rung(options, device, host, fits)
        if fits:
            return


def _ladder(
    config: RunConfig, policy: ScoringModel, ranks: int
) -> Iterator[tuple[dict[str, Any], RunConfig]]:
    """(options, the configuration with them), each with all before it; at last adapters instead."""
    shared = [{"parallel.sequence_parallel": size} for size in _shares(config, policy, ranks)]
    steps: list[tuple[dict[str, Any], Callable[[RunConfig], bool]]] = [
        ({"model.gradient_checkpointing": True}, lambda now: wants_checkpointing(now, policy)),
        ({"model.tiled_mlp": True}, lambda now: not _may_tile(now, policy)),
        ({"parallel.offload_optimizer": True}, lambda now: now.parallel.offload_optimizer),
        ({"model.activation_offloading": True}, lambda now: now.model.activation_offloading),
        *((share, lambda now: False) for share in shared),
        (
            {"parallel.offload_parameters": True},
            lambda now: now.parallel.offload_parameters or now.model.whole_weights,
        ),
    ]
    options: dict[str, Any] = {}
    yield options, config
    for more, there in steps:
        if there(_with(config, options)):
            continue
        options = options | more | _stage(_with(config, options | more))
        yield options, _with(config, options)
    if not config.model.has_adapters:
        names = (
            "gradient_checkpointing",
            "tiled_mlp",
            "activation_offloading",
            "sequence_parallel",
        )
        kept = {name: value for name, value in options.items() if name.split(".")[1] in names}
        yield {"model.lora.r": LORA_RANK} | kept, _with_lora(_with(config, kept), True)


def _shares(config: RunConfig, policy: ScoringModel, ranks: int) -> Iterator[int]:
    """How many ranks may share rows, beyond what the configuration has: powers of two."""
    model = policy.causal_lm
    heads = getattr(model.config.get_text_config(), "num_attention_heads", 1)
    others = config.model.attention not in ("auto", *NAMES)
    if others or architecture_of(model).alone is not None:
        return
    size = 2
    while size <= ranks:
        if size > config.parallel.sequence_parallel and ranks % size == heads % size == 0:
            yield size
        size *= 2


def _may_tile(config: RunConfig, policy: ScoringModel) -> bool:
    model = config.model
    return not (model.tiled_mlp or model.torch_compile or why_not_tiles(policy.causal_lm))


def _stage(config: RunConfig) -> dict[str, int]:
    """The ZeRO stage that the offloads need, where the configuration names a lower one."""
    parallel = config.parallel
    least = 3 if parallel.offload_parameters else 2 if parallel.offload_optimizer else 0
    named = parallel.zero_stage != "auto" and parallel.zero_stage < least
    return {"parallel.zero_stage": least} if named else {}


def _with(config: RunConfig, options: dict[str, Any]) -> RunConfig:
    sections: dict[str, dict[str, Any]] = {}
    for key, value in options.items():
        section, name = key.split(".")
        sections.setdefault(section, {})[name] = value
    update = {
        name: getattr(config, name).model_copy(update=values) for name, values in sections.items()
    }
    return config.model_copy(update=update)


def _with_lora(config: RunConfig, lora: bool) -> RunConfig:
    return _with(config, {"model.lora": LoraSection(r=LORA_RANK)}) if lora else config
