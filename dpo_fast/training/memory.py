"""Roughly how much memory a rank needs, from the sizes of its models and what is sharded or offloaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from dpo_fast.models import ScoringModel
from dpo_fast.models.layers import decoder_layers
from dpo_fast.models.quantization import bytes_of_weight, quantised_elements
from dpo_fast.models.quantization_section import QuantizationSection
from dpo_fast.ops.cpu import product_dtype
from dpo_fast.ops.linear_logp.plan import HeadPlan, default_workspace_bytes, plan
from dpo_fast.references import ReferenceModel
from dpo_fast.training import distributed
from dpo_fast.training.activations import Activations, Shape, mask_bytes
from dpo_fast.training.config import RunConfig
from dpo_fast.training.engine import zero_config
from dpo_fast.training.optimisers import OPTIMISERS

FP32 = 4
GROUP = 8  # completions of a group, assumed as long as the data are not read


@dataclass(frozen=True)
class Sizes:
    """Sizes of a run, in elements where no other unit stands.

    parameters: of the policy.
    trainable: those that are trained.
    gathered: of the largest part that stage 3 gathers at a time.
    head_bytes: what the head keeps between forward and backward, and its tiles.
    second_models: parameters of each model beside the policy.
    quantised: weights of the policy that are quantised, which are not among `parameters`.
    activations: of a micro-batch, where they are counted.
    bucket: what DeepSpeed gathers gradients in; None: not counted.
    on_cpu: the device is a CPU, which takes of a buffer what is written to.
    """

    parameters: int
    trainable: int
    gathered: int
    head_bytes: int
    second_models: Mapping[ReferenceModel, int] = field(default_factory=dict)
    quantised: int = 0
    activations: Activations | None = None
    bucket: int | None = None
    on_cpu: bool = False


class Line(NamedTuple):
    """Bytes of one rank on its device and in CPU memory, and how they come about."""

    what: str
    device: float
    host: float
    how: str


def memory(config: RunConfig, sizes: Sizes, ranks: int) -> list[Line]:
    """What weights, gradients, optimiser states, references, activations and head take."""
    parallel, size = config.parallel, config.model.torch_dtype.itemsize
    stage = config.zero_stage

    def line(
        what: str, elements: int, each: float, sharded_from: int, offloaded: bool | str
    ) -> Line:
        sharded = stage >= sharded_from and ranks > 1
        total = elements * each / (ranks if sharded else 1)
        how = f"{elements:,} x {each:g} bytes" + (f" / {ranks} ranks" if sharded else "")
        if offloaded == "nvme":
            return Line(what, 0.0, 0.0, f"{how} = {in_units(total)} in files")
        return Line(what, 0.0 if offloaded else total, total if offloaded else 0.0, how)

    lines = [line("weights", sizes.parameters, size, 3, parallel.offload_parameters)]
    if sizes.quantised:
        each = bytes_of_weight(config.model.quantization)
        lines.append(line("quantised weights", sizes.quantised, each, 4, False))
    if stage == 3:
        lines.append(line("weights in use", sizes.gathered, size, 4, False))
    summed = FP32 if stage else size  # DeepSpeed's stages add micro-batches up in fp32
    lines.append(line("gradients", sizes.trainable, summed, 2, parallel.offload_optimizer))
    # Two moments, and the fp32 weights that DeepSpeed updates; plain fp32 weights are their own.
    states = OPTIMISERS[config.train.optim].state_bytes + (FP32 if stage or size < FP32 else 0)
    lines.append(line("optimiser states", sizes.trainable, states, 1, parallel.offload_optimizer))
    for model, elements in sizes.second_models.items():
        name = "reference model" if model == config.reference.model else model.option
        when = ", before training" if model in config.stored_models else ""
        lines.append(line(name + when, elements, size, 3, config.offloads_reference))
    lines += _group_copies(config, sizes)
    lines += _buckets(config, sizes)
    if sizes.activations is None:
        lines.append(Line("head workspace", sizes.head_bytes, 0.0, "the head's plan above"))
    else:
        lines += _activation_lines(config, sizes.activations)
    return lines


def _group_copies(config: RunConfig, sizes: Sizes) -> list[Line]:
    """With hpZ every group of ranks has all weights of every model once more."""
    group = int(zero_config(config).get("zero_hpz_partition_size", 1))
    if config.zero_stage < 3 or group == 1:
        return []
    size, places = config.model.torch_dtype.itemsize, {False: 0, True: 0}
    places[bool(config.parallel.offload_parameters)] += sizes.parameters
    places[bool(config.offloads_reference)] += sum(sizes.second_models.values())
    how = f"{sum(places.values()):,} x {size} bytes / {group} ranks (zero_hpz_partition_size)"
    device, host = (places[offloaded] * size / group for offloaded in (False, True))
    return [Line("weights of a group", device, host, how)]


def _buckets(config: RunConfig, sizes: Sizes) -> list[Line]:
    """Where DeepSpeed gathers gradients before it reduces them: one, or two where it overlaps."""
    if not config.zero_stage or sizes.bucket is None:
        return []
    elements = min(sizes.bucket, sizes.trainable) if sizes.on_cpu else sizes.bucket
    size = FP32 if config.zero_stage == 1 else config.model.torch_dtype.itemsize
    count = 1 if sizes.on_cpu or config.zero_stage == 3 else 2
    how = f"{count} x {elements:,} x {size} bytes (reduce_bucket_size of zero_optimization)"
    return [Line("gradient buckets", count * elements * size, 0.0, how)]


def _activation_lines(config: RunConfig, counted: Activations) -> list[Line]:
    """Kept, and the larger of a layer and the head, which do not work at the same time."""
    model = config.model
    kept = "until the backward pass"
    if counted.host:
        kept += "; inputs of recomputed layers wait in CPU memory"
    at_once = ", at another time than the "
    of_layer = "a layer, forward or backward" + (" in tiles" if model.tiled_mlp else "")
    of_head = "workspace, hidden states of scored tokens, gradients; no logits"
    larger = counted.layer >= counted.head
    layer, head = (counted.layer, 0) if larger else (0, counted.head)
    if larger:
        of_head += f": {in_units(counted.head)}{at_once}layers"
    else:
        of_layer += f": {in_units(counted.layer)}{at_once}head"
    return [
        Line("activations kept", counted.kept, counted.host, kept),
        Line("activations of a layer", layer, 0.0, of_layer),
        Line("head", head, 0.0, of_head),
    ]


def mask_line(config: RunConfig, shape: Shape) -> list[Line]:
    """The mask of a padded micro-batch, which grows with the square of the length."""
    size = mask_bytes(shape, config.model.torch_dtype.itemsize)
    how = "train.layout=padded: [rows, 1, length, length]; packed and shared_prefix have none"
    return [Line("attention mask", size, 0.0, how)] if size else []


def sizes_of(
    policy: ScoringModel,
    second_models: Mapping[ReferenceModel, ScoringModel],
    head_bytes: int,
    quantization: QuantizationSection | None = None,
    **more,
) -> Sizes:
    """Sizes of models, on the meta device or loaded. more: other fields of `Sizes`."""
    model = policy.causal_lm
    quantised, held = quantised_elements(model, quantization)
    parts = [*decoder_layers(model), model.get_output_embeddings(), model.get_input_embeddings()]
    return Sizes(
        parameters=elements(policy) - held,
        quantised=quantised,
        trainable=elements(policy, trainable=True),
        gathered=max(map(elements, parts)),
        head_bytes=head_bytes,
        second_models={name: elements(second) for name, second in second_models.items()},
        **more,
    )


def elements(module: torch.nn.Module, trainable: bool = False) -> int:
    """Elements of a module's parameters, or of those that are trained."""
    kept = (p for p in module.parameters() if p.requires_grad or not trainable)
    return sum(getattr(p, "ds_numel", p.numel()) for p in kept)


def scored_tokens(config: RunConfig) -> int:
    """Of a micro-batch, at most."""
    train = config.train
    if train.tokens_per_batch is not None:
        return train.tokens_per_batch
    return answers(config) * train.micro_batch_size * (config.data.max_length - 1)


def answers(config: RunConfig) -> int:
    """Sequences of an example, at most. Only the data say how many a group has."""
    if config.loss.objective.grouped:
        return GROUP
    return 1 if config.data.only_single else 2


def head_plan(
    config: RunConfig,
    policy: ScoringModel,
    implementation: str,
    device: torch.device,
    workspace_bytes: int | None = None,
) -> HeadPlan:
    """The schedule of the head for a micro-batch. workspace_bytes: by default that of the device."""
    weight, budget = policy.causal_lm.get_output_embeddings().weight, config.train.workspace_bytes
    if workspace_bytes is None:
        workspace_bytes = default_workspace_bytes(device)
    return plan(
        -(-scored_tokens(config) // config.parallel.sequence_parallel),
        *getattr(weight, "ds_shape", weight.shape),
        weight.dtype,
        needs_head=weight.requires_grad,
        workspace_bytes=workspace_bytes if budget is None else budget,
        implementation=implementation,
        products=product_dtype(device, weight.dtype) if implementation == "torch" else None,
    )


def in_units(size: float) -> str:
    """Bytes for people to read."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size / 1024:.0f} KiB" if size else "-"


def memory_line(config: RunConfig, sizes: Sizes, ranks: int, device: torch.device) -> str:
    """What `memory` comes to, in a line."""
    lines = memory(config, sizes, ranks)
    on_device, host = (sum(column) for column in zip(*((x.device, x.host) for x in lines)))
    largest = sorted(lines, key=lambda line: -line.device)[:3]
    parts = ", ".join(f"{line.what} {in_units(line.device)}" for line in largest if line.device)
    in_host = f" and {in_units(host)} in CPU memory" if host else ""
    return (
        f"memory of a rank, roughly: {in_units(on_device)} on the device{in_host} ({parts}, ...), "
        "activations on top (dpo-fast doctor counts them); "
        f"the device has {in_units(distributed.capacity(device))}"
    )
