"""What a forward and a backward pass keep, counted on the meta device: shapes without numbers.

The model's own code runs, with its adapters, tiles and recomputed layers, so whatever it makes is counted,
until it is let go. Attention and head are stood for by functions that keep and make what theirs do.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface

from dpo_fast.models import ScoringModel
from dpo_fast.models.attention import NAMES
from dpo_fast.models.decoder import decoder_of
from dpo_fast.models.layers import checkpoint_layers, decoder_layers
from dpo_fast.models.tiles import tile_layers
from dpo_fast.ops.linear_logp.plan import HeadPlan

META = torch.device("meta")
COUNTED = "dpo_fast_counted"
FEW = 2  # layers that are counted where all are alike; one more says what each of the others adds


FROZEN_HEAD = "frozen"  # the schedule of a head that is not trained


@dataclass(frozen=True)
class Shape:
    """What the sizes of activations follow from.

    sequences, length: of a micro-batch.
    in_one_row: they lie along one row; else each has its own, and attention a mask.
    scored: tokens that the head predicts, at most.
    on_cpu: attention is SDPA's for CPUs, rather than a flash kernel.
    eager: it is the model's own, which writes out the scores of all heads, and makes the mask.
    """

    sequences: int
    length: int
    in_one_row: bool
    scored: int
    on_cpu: bool
    eager: bool = False

    @property
    def tokens(self) -> int:
        return self.sequences * self.length


@dataclass(frozen=True)
class Activations:
    """Bytes of a rank.

    kept: on the device, from the forward pass to the backward pass, before the head.
    layer: the most that a layer holds beside it, while it is computed or computed again.
    head: the most that the head holds beside it, with its hidden states and gradients.
    host: kept in CPU memory.
    """

    kept: int
    layer: int
    head: int
    host: int

    @property
    def peak(self) -> int:
        return self.kept + max(self.layer, self.head)


def count(
    make: Callable[[], ScoringModel],
    shape: Shape,
    head: HeadPlan,
    *,
    recomputed: bool,
    layers: int | list[int] | None = None,
    offload: bool = False,
    tile_tokens: int | None = None,
) -> Activations:
    """Count a model's activations. Of many layers that are alike three are counted.

    make: gives the model on the meta device, a new one each time.
    recomputed, layers, offload: as `checkpoint_layers` takes them.
    tile_tokens: as `tile_layers` takes it.
    """

    def run(few: int | None) -> Activations:
        model = make()
        if few is not None:
            _cut(model, few)
        if tile_tokens:
            tile_layers(model.causal_lm, tile_tokens)
        if recomputed:
            checkpoint_layers(model.causal_lm, layers)
        return _count(model, shape, head, offload)

    total = len(decoder_layers(make().causal_lm))
    if total <= FEW + 1 or layers is not None or not _alike(make()):
        return run(None)
    some, more = run(FEW), run(FEW + 1)
    return Activations(
        **{
            field.name: getattr(some, field.name)
            + (total - FEW) * (getattr(more, field.name) - getattr(some, field.name))
            for field in fields(Activations)
        }
    )


def _layer_list(model: ScoringModel) -> nn.ModuleList | None:
    """The list that the decoder's layers stand in."""
    layers = decoder_layers(model.causal_lm)
    for module in decoder_of(model.causal_lm).modules():
        if isinstance(module, nn.ModuleList) and list(module) == layers:
            return module
    return None


def _alike(model: ScoringModel) -> bool:
    layers = decoder_layers(model.causal_lm)
    kinds = {(type(each), tuple(p.shape for p in each.parameters())) for each in layers}
    return len(kinds) == 1 and _layer_list(model) is not None


def _cut(model: ScoringModel, count: int) -> None:
    """Leave out all but the first layers."""
    del _layer_list(model)[count:]
    model.causal_lm.config.get_text_config().num_hidden_layers = count


def _count(model: ScoringModel, shape: Shape, plan: HeadPlan, offload: bool) -> Activations:
    causal_lm = model.causal_lm
    model.train()
    own = NAMES["sdpa"] if shape.in_one_row and shape.on_cpu else COUNTED
    causal_lm.set_attn_implementation("eager" if shape.eager else own)
    # It looks for padding in ids that are not there (GPT-2).
    decoder_of(causal_lm).warn_if_padding_and_no_attention_mask = lambda *_: None
    watch = _Watch(model)
    head = causal_lm.get_output_embeddings()
    head.forward = lambda hidden, targets, extras: {
        "logp": _Head.apply(hidden, head.weight, plan, watch)
    }
    if offload:
        for layer in decoder_layers(causal_lm):
            layer._gradient_checkpointing_func = watch.checkpoint
    for parameter in model.parameters():  # gradients are counted with the states
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_drop)
    with watch, _experts_in_any_dtype():
        model(**_batch(shape))["logp"].sum().backward()
    return Activations(
        kept=watch.kept,
        layer=watch.peaks["layer"] - watch.kept,
        head=watch.peaks["head"] - watch.kept,
        host=watch.host,
    )


@contextlib.contextmanager
def _experts_in_any_dtype():
    """PyTorch's product of groups is bf16's alone without numbers; transformers' own keeps as much."""
    from transformers.integrations import moe

    known = getattr(moe, "_can_use_grouped_mm", None)
    if known is None:
        yield
        return
    moe._can_use_grouped_mm = lambda input, weight, offs: (
        weight.dtype == torch.bfloat16 and known(input, weight, offs)
    )
    try:
        yield
    finally:
        moe._can_use_grouped_mm = known


def _drop(parameter: nn.Parameter) -> None:
    parameter.grad = None


def _batch(shape: Shape) -> dict:
    """Arguments of the forward of a `ScoringModel`."""
    rows = (1, shape.tokens) if shape.in_one_row else (shape.sequences, shape.length)
    numbers = lambda *size: torch.empty(size, dtype=torch.long, device=META)  # noqa: E731
    spans = ((shape.length, 0, -1),) * shape.sequences if shape.in_one_row else None
    return {
        "input_ids": numbers(*rows),
        "position_ids": numbers(*rows),
        "attention_mask": numbers(*rows) if shape.eager else None,
        "spans": spans,
        "rows_U": numbers(shape.scored),
        "targets_U": numbers(shape.scored),
        "predictions_T": numbers(shape.scored),
    }


class _Watch(TorchDispatchMode):
    """Counts the bytes of tensors as they come and go, those of parameters and buffers aside."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.phase, self.peaks = "layer", {"layer": 0, "head": 0}
        self.live, self.kept, self.host = 0, 0, 0
        self.known = weakref.WeakSet()
        self.always = [each.untyped_storage() for each in (*model.parameters(), *model.buffers())]
        self.known.update(self.always)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for each in tree_leaves(made):
            if isinstance(each, Tensor):
                self.add(each)
        return made

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self.known:
            return
        self.known.add(storage)
        size = storage.nbytes()
        self.live += size
        self.peaks[self.phase] = max(self.peaks[self.phase], self.live)
        weakref.finalize(storage, self.free, size)

    def free(self, size: int) -> None:
        self.live -= size

    def enter(self, phase: str) -> None:
        self.phase = phase
        self.peaks[phase] = max(self.peaks[phase], self.live)

    def checkpoint(self, function, *inputs):
        """torch's checkpoint, with inputs that go to the other memory."""

        def pack(tensor: Tensor) -> tuple:
            self.host += tensor.untyped_storage().nbytes()
            return tensor.shape, tensor.stride(), tensor.dtype

        def unpack(kept: tuple) -> Tensor:
            shape, stride, dtype = kept
            return torch.empty_strided(shape, stride, dtype=dtype, device=META)

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return checkpoint(function, *inputs, use_reentrant=False)


def _bytes(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device=META)


class _Head(torch.autograd.Function):
    """What `linear_logp` keeps and makes by its plan, without the products."""

    @staticmethod
    def forward(ctx, hidden_UD, weight_VD, plan, watch):
        rows = hidden_UD.untyped_storage().nbytes()
        watch.kept = watch.live - rows
        watch.enter("head")
        scratch = _bytes(plan.tile_bytes + plan.sum_bytes)
        kept = _bytes(plan.kept_bytes)
        frozen = plan.schedule == FROZEN_HEAD
        ctx.save_for_backward(torch.empty_like(hidden_UD) if frozen else hidden_UD, kept)
        ctx.plan, ctx.watch, ctx.weight = plan, watch, weight_VD
        del scratch
        return hidden_UD.new_empty(len(hidden_UD), dtype=torch.float32)

    @staticmethod
    def backward(ctx, grad):
        hidden_UD, _ = ctx.saved_tensors
        scratch = _bytes(ctx.plan.tile_bytes + ctx.plan.sum_bytes)
        dW = torch.empty_like(ctx.weight) if ctx.needs_input_grad[1] else None
        dH = torch.empty_like(hidden_UD)
        del scratch
        ctx.watch.enter("layer")
        return dH, dW, None, None


class _Attention(torch.autograd.Function):
    """What a flash kernel keeps and makes: q, k, v, output and a log-sum-exp of every query and head.

    Its backward pass sums dq in fp32, and holds dk and dv for every head of the queries (flash-attn 2).
    """

    @staticmethod
    def forward(ctx, q, k, v):
        heads, tokens, dim = q.shape[1], q.shape[0] * q.shape[2], v.shape[-1]
        output = q.new_empty(q.shape[0], q.shape[2], heads, dim)
        ctx.save_for_backward(q, k, v, output, _bytes(4 * heads * tokens))
        return output

    @staticmethod
    def backward(ctx, grad):
        q, k, v, *_ = ctx.saved_tensors
        repeated = q.shape[1] // k.shape[1]
        sums = _bytes(4 * q.numel() + 4 * q.numel() // q.shape[-1])
        wide = _bytes((k.numel() + v.numel()) * repeated * q.itemsize if repeated > 1 else 0)
        slopes = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        del sums, wide
        return slopes


def _counted(module, query, key, value, attention_mask, **others) -> tuple[Tensor, None]:
    return _Attention.apply(query, key, value), None


AttentionInterface.register(COUNTED, _counted)


def mask_bytes(shape: Shape, itemsize: int) -> int:
    """Of the mask of sequences that have rows of their own; on a CPU SDPA copies it to numbers."""
    if shape.in_one_row or shape.eager:  # that of eager attention is made and counted with the rest
        return 0
    return shape.sequences * shape.length**2 * (1 + itemsize * shape.on_cpu)
