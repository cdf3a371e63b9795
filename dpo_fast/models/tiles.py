"""MLPs and norms in tiles of tokens, so that what they hold inside does not grow with the row.

A gated MLP of width I holds three tensors of [tokens, I] for its backward pass, an RMSNorm three of
[tokens, D], two of them in fp32. Both treat every token alike. So they run tile by tile, keep their input
alone, and make the rest of a tile again in backward (Bekman et al. 2025, arXiv:2506.13996, section 3.3.2).

DeepSpeed's TiledMLP does the same for one MLP and is not used. It adds the gradients of weights up in their
own dtype, tile after tile, where one product over all tokens adds in fp32. It recomputes with other dropout
masks than the forward pass had, and at ZeRO-3 gathers the weights for every tile, which needs as many tiles
on every rank. Here gradients of weights are summed in fp32, masks are drawn again from the same state,
and an MLP is a leaf of ZeRO-3: its weights are gathered once, whatever its tiles are.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from functools import partial
from types import MethodType

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states
from transformers import PreTrainedModel

from dpo_fast.errors import UserError
from dpo_fast.models.config import ModelSection
from dpo_fast.models.decoder import decoder_of
from dpo_fast.models.layers import decoder_layers
from dpo_fast.ops.once import once_differentiable

MLPS = ("mlp", "feed_forward", "ffn")  # what transformers calls them in a decoder layer


def check_tiles(section: ModelSection, model: PreTrainedModel) -> None:
    """Raises UserError if `model.tiled_mlp` cannot be honoured. A model on the meta device will do."""
    obstacle = why_not_tiles(model) if section.tiled_mlp else None
    if obstacle:
        raise UserError(f"model.tiled_mlp={section.tiled_mlp} cannot be honoured: {obstacle}")


def tile_layers(model: PreTrainedModel, tokens: int) -> None:
    """Run the MLPs of the decoder's layers and its norms in tiles of so many tokens, in place."""
    for module in _norms(model):
        _tile(module, tokens)
    for module in _mlps(model):
        module._z3_leaf = True  # what deepspeed.utils.set_z3_leaf_modules marks
        module.register_forward_pre_hook(_with_gradient, with_kwargs=True, prepend=True)
        _tile(module, tokens)


def why_not_tiles(model: PreTrainedModel) -> str | None:
    """Why the layers of a model cannot run in tiles."""
    name, layers = type(model).__name__, decoder_layers(model)
    experts = [each for layer in layers for each in layer.modules() if hasattr(each, "experts")]
    if experts:
        return (
            f"the experts of {name} choose among all tokens of a batch at once, and are not cut into "
            "tiles; leave it out. A token meets few experts, so their memory is that of a small MLP"
        )
    if any("state" in inspect.signature(mlp.forward).parameters for mlp in _mlps(model)):
        return f"the MLPs of {name} carry state along the tokens (RWKV); leave it out"
    if len(list(_mlps(model))) < len(layers) or not layers:
        return f"the layers of {name} have no MLP in a module of its own ({', '.join(MLPS)}); leave it out"
    return None


def _mlps(model: PreTrainedModel) -> Iterator[nn.Module]:
    for layer in decoder_layers(model):
        for name, child in layer.named_children():
            if name in MLPS:
                yield child


def _norms(model: PreTrainedModel) -> Iterator[nn.Module]:
    """Norms over the last dimension: whatever else the shape has, every row is alike."""
    for module in decoder_of(model).modules():
        kind = type(module).__name__
        named = "RMSNorm" in kind or kind.endswith("LayerNorm") or isinstance(module, nn.LayerNorm)
        whole = all(p.dim() == 1 for p in module.parameters())
        if named and whole and not list(module.children()):
            yield module


def _tile(module: nn.Module, tokens: int) -> None:
    """Give a module a forward that runs its own one tile by tile, a method that copies have, too."""
    module.whole_forward, module.tile_tokens = module.forward, tokens
    module.forward = MethodType(_forward_in_tiles, module)


def _forward_in_tiles(module: nn.Module, x: Tensor, *others, **options) -> Tensor:
    """x: [B, tokens, ...]. What does not fill a tile runs as it is."""
    size = max(module.tile_tokens // x.shape[0], 1)
    if x.dim() < 3 or x.shape[1] <= size:
        return module.whole_forward(x, *others, **options)
    function = partial(module.whole_forward, **options)
    trained = [p for p in module.parameters() if p.requires_grad]
    return _Tiled.apply(function, size, module, len(others), x, *others, *trained)


class _Tiled(torch.autograd.Function):
    """function(x, *others) along dimension 1, `size` places at a time.

    x: [B, tokens, ...]. Of `others`, count in number, tensors that begin with [B, tokens] are cut
    as well. The rest of the inputs are the parameters that a gradient is wanted of.
    """

    @staticmethod
    def forward(ctx, function, size, module, count, *inputs):
        others, trained = inputs[: 1 + count], inputs[1 + count :]
        ctx.function, ctx.size = function, size
        # Leaves stay on ctx itself: DeepSpeed swaps the storage of a sharded parameter.
        ctx.trained = trained
        ctx.cut = [_is_cut(each, others[0]) for each in others]
        ctx.whole = [None if isinstance(each, Tensor) else each for each in others]
        ctx.drawn = _Drawn(others[0]) if _has_dropout(module) else None
        ctx.save_for_backward(*(each if isinstance(each, Tensor) else None for each in others))
        output = None
        for place in _places(others[0], size):
            tile = function(*_tile_of(others, ctx.cut, place))
            if output is None:
                output = tile.new_empty(*others[0].shape[:2], *tile.shape[2:])
            output[:, place] = tile
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        saved = [
            kept if kept is not None else whole for kept, whole in zip(ctx.saved_tensors, ctx.whole)
        ]
        count, needs = len(saved), ctx.needs_input_grad[4:]
        totals = [
            torch.zeros_like(each, dtype=_precise(each) if number >= count else each.dtype)
            if need
            else None
            for number, (each, need) in enumerate(zip((*saved, *ctx.trained), needs, strict=True))
        ]
        again = contextlib.nullcontext() if ctx.drawn is None else ctx.drawn.again()
        with again:
            for place in _places(saved[0], ctx.size):
                _add_slopes(ctx, saved, totals, place, grad[:, place])
        slopes = [
            total if total is None else total.to(each.dtype)
            for total, each in zip(totals, (*saved, *ctx.trained))
        ]
        return None, None, None, None, *slopes


def _add_slopes(ctx, saved: list, totals: list[Tensor | None], place: slice, grad: Tensor) -> None:
    """Make a tile again, and add the gradients of its inputs and of the weights."""
    tile = _tile_of(saved, ctx.cut, place)
    inputs = [each.detach() if isinstance(each, Tensor) else each for each in tile]
    for each, total in zip(inputs, totals):
        if total is not None:
            each.requires_grad_()
    with torch.enable_grad():
        output = ctx.function(*inputs)
    wanted = [
        (each, total) for each, total in zip((*inputs, *ctx.trained), totals) if total is not None
    ]
    slopes = torch.autograd.grad(output, [each for each, _ in wanted], grad, allow_unused=True)
    cut = [*ctx.cut, *[False] * len(ctx.trained)]
    among = [is_cut for is_cut, total in zip(cut, totals) if total is not None]
    for (_, total), slope, is_cut in zip(wanted, slopes, among):
        if slope is not None:
            (total[:, place] if is_cut else total).add_(slope)


def _precise(parameter: Tensor) -> torch.dtype:
    """The dtype that gradients of a weight are summed in over tiles."""
    return torch.promote_types(parameter.dtype, torch.float32)


def _is_cut(each: object, x: Tensor) -> bool:
    return isinstance(each, Tensor) and each.shape[:2] == x.shape[:2]


def _tile_of(inputs, cut: list[bool], place: slice) -> list:
    return [each[:, place] if is_cut else each for each, is_cut in zip(inputs, cut)]


def _places(x: Tensor, size: int) -> Iterator[slice]:
    """The tiles of an input. Without numbers, where only memory is counted, one stands for all."""
    for first in range(0, size if x.is_meta else x.shape[1], size):
        yield slice(first, min(first + size, x.shape[1]))


def _has_dropout(module: nn.Module) -> bool:
    """Whether a forward draws numbers: adapters may have dropout."""
    return any(
        isinstance(each, nn.Dropout) and each.p and each.training for each in module.modules()
    )


class _Drawn:
    """The random state before the first tile, to draw the same numbers again."""

    def __init__(self, x: Tensor) -> None:
        self.cpu = torch.get_rng_state()
        self.devices, self.states = get_device_states(x)
        self.kind = x.device.type

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        devices = self.devices if self.kind == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.set_rng_state(self.cpu)
            if self.kind == "cuda":
                set_device_states(self.devices, self.states)
            yield


def _with_gradient(module: nn.Module, inputs: tuple, options: dict) -> tuple[tuple, dict]:
    """Let the input of a module that is trained want a gradient.

    DeepSpeed reduces the gradients of a leaf module when that of its input is there. Where no input has one
    it would reduce them at once, before they are computed.
    """
    trained = torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters())
    if not trained or any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
        return inputs, options
    first, *others = inputs
    return (first.detach().requires_grad_(), *others), options
