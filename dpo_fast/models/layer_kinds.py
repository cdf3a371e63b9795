"""Which kinds of layers a model has, and which of them mix tokens by more than attention can be told.

transformers names the kind of every layer in `layer_types` of the configuration.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch import nn
from transformers import PreTrainedModel

from dpo_fast.models.decoder import decoder_of
from dpo_fast.models.layers import decoder_layers

# Attention that is told which tokens see which, by a mask or by a plan of the row.
TOLD = frozenset(("full_attention", "sliding_attention", "chunked_attention"))
# Layers that look at every token alone. Nemotron-H has layers that are nothing else.
TOKENWISE = frozenset(("mlp", "moe", "dense", "sparse"))
STATE = "carry state along the tokens"
# What the others do, by kind.
MEANINGS = {
    "linear_attention": STATE,
    "conv": STATE,
    "hybrid": STATE,
    "hybrid_sliding": STATE,
    "recurrent": STATE,
    "indexed_attention": "choose their keys out of the whole row",
    "minimax_m3_sparse": "choose blocks of keys out of the whole row",
    "compressed_sparse_attention": "make one key of several tokens that are neighbours in the row",
    "heavily_compressed_attention": "make one key of several tokens that are neighbours in the row",
    "reference_sliding_attention": "see all of a prompt and a window of what is generated",
    "window_attention": "see windows that are counted along the row",
}
UNKNOWN = "mix tokens in a way that is not known here"
NO_MIXERS = ("norm", "mlp", "moe", "expert", "dropout", "feedforward", "act")


class MixingLayer(NamedTuple):
    """A layer that mixes tokens by more than attention that is told which tokens see which.

    index: its place among the decoder's layers. kind: as the configuration calls it.
    name, type: of the module that mixes; the name as in `named_modules`, empty if none is found.
    """

    index: int
    kind: str
    name: str
    type: str

    @property
    def meaning(self) -> str:
        return MEANINGS.get(self.kind, UNKNOWN)


def mixing_layers(model: PreTrainedModel) -> list[MixingLayer]:
    """The layers that do more than attention and layers of single tokens do, from first to last."""
    kinds = _kinds(model)
    others = [place for place, kind in enumerate(kinds) if kind not in TOLD | TOKENWISE]
    if not others:
        return []
    names = {id(module): name for name, module in model.named_modules()}
    layers = _layers(model, len(kinds))
    found = []
    for place in others:
        mixer = _mixer(layers[place]) if layers else None
        name = "" if mixer is None else names.get(id(mixer), "")
        found.append(MixingLayer(place, kinds[place], name, "" if mixer is None else _type(mixer)))
    return found


def carried_state(model: PreTrainedModel) -> str:
    """The kinds of layers that go by more than the tokens before, padding too; empty if there are none."""
    return ", ".join(sorted(set(_kinds(model)) - TOLD - TOKENWISE))


def has_plain_attention(model: PreTrainedModel) -> bool:
    """Whether there is a layer with attention that has to be told which tokens see which."""
    kinds = _kinds(model)
    return not kinds or bool(set(kinds) & (TOLD | {"hybrid", "hybrid_sliding"}))


def _kinds(model: PreTrainedModel) -> list[str]:
    kinds = list(getattr(model.config.get_text_config(), "layer_types", None) or ())
    if model._is_stateful and set(kinds) <= TOLD | TOKENWISE:  # RWKV and xLSTM name no kinds
        return ["recurrent"] * max(len(kinds), len(decoder_layers(model)), 1)
    return kinds


def _layers(model: PreTrainedModel, count: int) -> Sequence[nn.Module]:
    """The decoder's layers, if there are so many; else none."""
    lists = [each for each in decoder_of(model).children() if isinstance(each, nn.ModuleList)]
    alike = [each for each in (decoder_layers(model), *lists) if len(each) == count]
    return alike[0] if alike else ()


def _mixer(layer: nn.Module) -> nn.Module:
    """The part of a layer that mixes tokens: the first that is neither a norm nor a feed-forward layer."""
    parts = [each for each in layer.children() if not _type(each).lower().endswith(NO_MIXERS)]
    placed = [each for each in parts if hasattr(each, "layer_idx")]
    return (placed or parts or [layer])[0]


def _type(module: nn.Module) -> str:
    return type(module).__name__


def described(layers: Iterable[MixingLayer]) -> str:
    """In words: `layers that carry state along the tokens (linear_attention: layers 0-2, SomeMixer)`."""
    by_meaning: dict[str, dict[tuple[str, str], list[int]]] = {}
    for layer in layers:
        places = by_meaning.setdefault(layer.meaning, {}).setdefault((layer.kind, layer.type), [])
        places.append(layer.index)
    parts = []
    for meaning, kinds in by_meaning.items():
        each = [
            f"{kind}: layer{'s' if len(places) > 1 else ''} {ranges(places)}"
            + (f", {name}" if name else "")
            for (kind, name), places in kinds.items()
        ]
        parts.append(f"layers that {meaning} ({'; '.join(each)})")
    return " and ".join(parts)


def ranges(indices: Iterable[int]) -> str:
    """[0, 1, 2, 5] as 0-2, 5."""
    parts: list[list[int]] = []
    for index in indices:
        if parts and parts[-1][-1] == index - 1:
            parts[-1].append(index)
        else:
            parts.append([index])
    return ", ".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts)
