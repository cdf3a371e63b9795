"""What a model's architecture allows: layouts and attention. Known before a weight is loaded."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import is_flash_attn_2_available

from dpo_fast.data.layouts import LAYOUTS, Layout, layouts_with
from dpo_fast.errors import UserError
from dpo_fast.models import recurrent
from dpo_fast.models.attention import NAMES, has_varlen
from dpo_fast.models.attention_trial import try_attention
from dpo_fast.models.by_sequence import serves as serves_attention
from dpo_fast.models.config import ModelSection
from dpo_fast.models.decoder import decoder_of
from dpo_fast.models.handed import counts_places, own_attention, serve_handed
from dpo_fast.models.layer_kinds import MixingLayer, described, has_plain_attention, mixing_layers
from dpo_fast.models.load import load_skeleton
from dpo_fast.ops.dispatch import Choice

HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Architecture:
    """What matters of a model to layouts and attention.

    obstacle: why sequences cannot share a row; None where they can.
    softcap, sinks: whether its attention has them.
    sdpa: whether transformers' sdpa serves it.
    blocking: the layers that stand in the way of sequences that share a row.
    beside: layers that mix tokens beside attention and can keep sequences of a row apart.
    own: its attention is code of its own, which runs over the sequences of a row.
    """

    name: str
    obstacle: str | None
    softcap: bool
    sinks: bool
    sdpa: bool = True
    blocking: tuple[MixingLayer, ...] = ()
    beside: tuple[MixingLayer, ...] = ()
    own: bool = False

    @property
    def alone(self) -> str | None:
        """Why ranks cannot share a row: exchanging heads serves attention alone. None where they can."""
        if self.own and self.obstacle is None:
            return "its attention is code of its own"
        return self.obstacle or (f"it has {described(self.beside)}" if self.beside else None)

    def allows(self, layout: Layout) -> bool:
        return self.obstacle is None or not layout.shares_rows


def architecture_of(model: PreTrainedModel) -> Architecture:
    """The architecture of a model, loaded or on the meta device."""
    mixing = mixing_layers(model)
    beside = tuple(layer for layer in mixing if _keeps_apart(model, layer))
    blocking = tuple(layer for layer in mixing if layer not in beside)
    return Architecture(
        type(model).__name__,
        _obstacle(model, blocking, beside),
        softcap=getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None,
        sinks=any(hasattr(module, "sinks") for module in model.modules()),
        sdpa=model._supports_sdpa,
        blocking=blocking,
        beside=beside,
        own=own_attention(model),
    )


def _keeps_apart(model: PreTrainedModel, layer: MixingLayer) -> bool:
    """Whether a layer that mixes tokens beside attention does so as the plan of a row says."""
    mixer = model.get_submodule(layer.name) if layer.name else None
    if mixer is None:
        return False
    return serves_attention(mixer) or any(map(recurrent.served, mixer.modules()))


def read_architecture(section: ModelSection, option: str = "model.path") -> Architecture:
    """The architecture of a section's model, read without weights. Raises UserError if that fails."""
    return architecture_of(load_skeleton(section, option))


def _obstacle(
    model: PreTrainedModel, blocking: Sequence[MixingLayer], beside: Sequence[MixingLayer]
) -> str | None:
    """Why sequences cannot share a row: something beside attention mixes tokens, or may."""
    if blocking:
        return f"it has {described(blocking)}"
    if _without_attention(model, beside):
        return None
    unseen, own = None, own_attention(model)
    if not model._supports_attention_backend and has_plain_attention(model) and not own:
        unseen = "it does not take its attention from transformers' AttentionInterface"
    tried = _unsharded(model)
    serve_handed(tried)
    apart = [tried.get_submodule(layer.name) for layer in beside]
    if found := try_attention(tried, decoder_of(tried), unseen, apart):
        return found
    known = inspect.signature(type(decoder_of(model)).forward).parameters
    if "position_ids" not in known and not counts_places(model):
        return "its forward takes no position_ids, so every sequence would go on from the last"
    return None


def _without_attention(model: PreTrainedModel, beside: Sequence[MixingLayer]) -> bool:
    """Whether every layer keeps sequences apart and none is attention, as in Mamba: no more is asked."""
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or ()
    return len(beside) == len(kinds) and set(kinds) == {"linear_attention"}


def _unsharded(model: PreTrainedModel) -> PreTrainedModel:
    """The model; in the place of one that FSDP has sharded already another of the same configuration.

    A trial runs the decoder alone and breaks off, and FSDP takes the first module that runs for the root.
    """
    if not isinstance(model, FSDPModule):
        return model
    own = type(model).__mro__[2]  # fully_shard puts FSDPLlama and FSDPModule before Llama
    with torch.device("meta"):
        return own(model.config)


def choose_layout(requested: str, architecture: Architecture) -> Choice:
    """The layout for `train.layout`; for `auto` the last of the table that is allowed.

    Raises:
        UserError: the architecture cannot have the layout that is asked for.
    """
    allowed = [name for name, layout in LAYOUTS.items() if architecture.allows(layout)]
    if requested == "auto":
        name = allowed[-1]
        if len(allowed) == len(LAYOUTS):
            return Choice(name, LAYOUTS[name].merit)
        return Choice(name, f"{architecture.name} allows no other: {architecture.obstacle}")
    if requested not in allowed:
        raise UserError(
            f"train.layout={requested} cannot be honoured for {architecture.name}: "
            f"{architecture.obstacle}. Set train.layout={', '.join(allowed)} or auto"
        )
    return Choice(requested, "train.layout says so")


def choose_attention(
    requested: str,
    layout: str,
    device: torch.device,
    dtype: torch.dtype,
    architecture: Architecture,
) -> Choice:
    """The name to give transformers for `model.attention` and a layout.

    Raises:
        UserError: the named implementation cannot do it on this device, dtype, layout or model.
    """
    shared = LAYOUTS[layout].shares_rows
    if shared and architecture.own:
        return _own(requested, architecture)
    if requested == "auto":
        return _automatic(shared, device, dtype, architecture)
    refusal = _refusal(requested, shared, device, dtype, architecture)
    if refusal:
        raise UserError(f"model.attention={requested} {refusal}")
    return Choice(NAMES[requested] if shared else requested, "model.attention says so")


def _own(requested: str, architecture: Architecture) -> Choice:
    """For sequences of a row, of a model whose attention is code of its own."""
    names = ("sdpa", "eager") if architecture.sdpa else ("eager",)
    if requested not in ("auto", *names):
        raise UserError(
            f"model.attention={requested} does not serve {architecture.name}, whose attention is code of "
            f"its own: set model.attention=auto or {' or '.join(names)}"
        )
    name = names[0] if requested == "auto" else requested
    return Choice(name, "attention of the model's own code, over each sequence of the row")


def _automatic(
    shared: bool, device: torch.device, dtype: torch.dtype, architecture: Architecture
) -> Choice:
    if not shared:
        if architecture.softcap or architecture.sinks:
            return Choice("eager", "sdpa knows neither soft caps nor sinks")
        if not architecture.sdpa:
            return Choice("eager", f"{architecture.name} has its own attention and no sdpa")
        return Choice("sdpa", "a padded batch is plain causal attention with a mask")
    if device.type == "cpu":
        return Choice(NAMES["sdpa"], "SDPA sequence by sequence; the others are for GPUs")
    reasons = {
        "flash_attention_3": "flash-attn 3 is installed: varlen attention",
        "flash_attention_2": "flash-attn 2 is installed: varlen attention",
        "varlen": "PyTorch's varlen attention; flash-attn is not installed",
    }
    for name, reason in reasons.items():
        if not _refusal(name, True, device, dtype, architecture):
            return Choice(NAMES[name], reason)
    return Choice(
        NAMES["flex_attention"],
        "one kernel for any mask; the varlen kernels do not serve this dtype, model or installation",
    )


def _refusal(
    name: str, shared: bool, device: torch.device, dtype: torch.dtype, architecture: Architecture
) -> str | None:
    """Why an implementation of attention cannot be used here, with the remedy.

    shared: whether sequences share a row.
    """
    known = {*NAMES, "eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()}
    if name not in known and "/" not in name:  # with a slash it is a kernel of the hub
        near = difflib.get_close_matches(name, ("auto", *known), 1)
        hint = f"did you mean {near[0]}?" if near else "auto chooses one"
        return f"is no implementation of attention; {hint}"
    if not shared:
        return _refusal_of_a_mask(name, device, architecture)
    if name not in NAMES:
        return (
            f"cannot keep sequences of one row apart: set train.layout={layouts_with(shares_rows=False)}, "
            f"or model.attention=auto, {', '.join(list(NAMES)[:-1])} or {list(NAMES)[-1]}"
        )
    if name == "sdpa":
        return None
    if device.type == "cpu":
        return "does not train on a CPU: use auto or sdpa"
    if name == "flex_attention":
        return None
    if dtype not in HALF:
        return "works in bf16 only: set model.dtype=bf16, or model.attention=flex_attention or sdpa"
    if architecture.sinks or (architecture.softcap and name == "varlen"):
        what = "sinks" if architecture.sinks else "soft-capped scores"
        return f"does not know {what}: set model.attention=auto or flex_attention"
    return _missing(name)


def _missing(name: str) -> str | None:
    """What the installation lacks for one of the kernels."""
    missing = {
        "varlen": None if has_varlen() else "needs torch 2.11 or later",
        "flash_attention_2": None
        if is_flash_attn_2_available()
        else "needs flash-attn 2 installed",
        "flash_attention_3": None
        if importlib.util.find_spec("flash_attn_interface")
        else "needs flash-attn 3 installed",
    }[name]
    return missing and f"{missing}; or set model.attention=auto"


def _refusal_of_a_mask(name: str, device: torch.device, architecture: Architecture) -> str | None:
    """As `_refusal`, where every sequence has a row of its own and attention gets a mask."""
    if name.startswith("flash_attention") and device.type == "cpu":
        return "does not run on a CPU: use auto, sdpa or eager"
    if name == "flex_attention" and device.type == "cpu":
        return "does not train on a CPU: use auto, sdpa or eager"
    if name == "sdpa" and (architecture.softcap or architecture.sinks):
        return (
            f"would leave out the soft cap or the sinks of {architecture.name}'s attention: set "
            "model.attention=eager or auto, or train.layout=auto"
        )
    if name == "sdpa" and not architecture.sdpa:
        return f"does not serve {architecture.name}: set model.attention=eager or auto"
    if name == "varlen":
        names = layouts_with(shares_rows=True)
        return f"serves sequences that share a row: set train.layout={names}, or auto"
    return None
