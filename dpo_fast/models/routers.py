"""Routers of a mixture of experts: listened to while the model computes, and summed over tokens.

transformers marks them in `_can_record_outputs` of its models, and so do we find them. Of every router and
every token there are the logits [E], and the K experts that compute it.

A token counts once for every sequence that it is part of, whether a layout computes it once or in each of
them. Padding does not count.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dpo_fast.models.decoder import decoder_of

# Rows of `experts` below. load: choices that the model makes; picks: choices of the greatest logits, as
# transformers' balancing loss counts them; mass: softmax of the logits.
LOAD, PICKS, MASS = range(3)
# Columns of `layers` below. tokens: that the layer routes; entropy: of the softmax, nats;
# choices: K for every token; dropped: choices with weight 0, which compute nothing.
TOKENS, ENTROPY, CHOICES, DROPPED = range(4)


class Routers:
    """The routers of a model. `listening` is a context in which their outputs are summed.

    count: how many there are; 0 of a model without experts, or whose routers transformers does not mark.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._heard: Heard | None = None
        found = list(routers_of(model))
        self.count = len(found)
        for router, index in found:
            top_k = top_k_of(model, router)
            # For good, and before any layer is compiled: a compiled block has the hooks that it had then.
            router.register_forward_hook(partial(self._hear, index, top_k))

    @contextlib.contextmanager
    def listening(self, copies_N: Tensor | None, balanced: bool) -> Iterator[Heard | None]:
        """Sum what the routers give in this context; where activations are recomputed, they are not heard.

        copies_N: sequences that each token is part of, int64. None: nothing is summed.
        balanced: also keep the logits for the gradient of the balancing loss.
        """
        self._heard = None if copies_N is None else Heard(copies_N, balanced)
        try:
            yield self._heard
        finally:
            self._heard = None

    def _hear(self, index: int, top_k: int, router: nn.Module, inputs: tuple, output: Any) -> None:
        if self._heard is not None:
            self._heard.add(output, index, top_k)


class Heard:
    """What the routers gave in one forward."""

    def __init__(self, copies_N: Tensor, balanced: bool) -> None:
        self.copies_N, self.balanced = copies_N, balanced
        self.experts: list[Tensor] = []
        self.layers: list[Tensor] = []
        self.logits: list[Tensor] = []

    def add(self, output: Any, index: int, top_k: int) -> None:
        """The output of one router. No operation here may be one that autograd records.

        A layer that is checkpointed is computed again without it, and the two must save the same tensors.
        """
        logits = output if isinstance(output, Tensor) else output[index]
        if self.balanced:
            self.logits.append(logits)
        with torch.no_grad():
            experts, layer = router_sums(logits, self.copies_N, *_choices(logits, output, top_k))
        self.experts.append(experts)
        self.layers.append(layer)

    def outputs(self) -> dict[str, Tensor]:
        """Sums over the tokens of the forward.

        router_experts: fp64 [routers, 3, E], the rows LOAD, PICKS and MASS.
        router_layers: fp64 [routers, 4], the columns TOKENS, ENTROPY, CHOICES and DROPPED.
        router_mass: fp32 [E], MASS of all layers together, with its gradient; where it is asked for.
        """
        if not self.experts:
            return {}
        found = {"router_experts": torch.stack(self.experts)}
        found["router_layers"] = torch.stack(self.layers)
        if self.balanced:
            copies_N = self.copies_N.float()
            masses = [copies_N @ rows_of(each).float().softmax(-1) for each in self.logits]
            found["router_mass"] = torch.stack(masses).sum(0)
        return found


def router_sums(
    logits: Tensor,
    copies_N: Tensor,
    chosen_NK: Tensor | None,
    weights_NK: Tensor | None,
    top_k: int,
) -> tuple[Tensor, Tensor]:
    """`experts` [3, E] and `layers` [4] of one router, fp64.

    chosen_NK, weights_NK: the experts that it chooses and what they weigh; None: those of `top_k`.
    """
    logits_NE, copies_N = rows_of(logits).float(), copies_N.float()
    logp_NE = logits_NE.log_softmax(-1)
    mass_NE = logp_NE.exp()
    picked_NK = mass_NE.topk(top_k, -1).indices
    chosen_NK = picked_NK if chosen_NK is None else chosen_NK
    kept_NK = torch.ones_like(chosen_NK) if weights_NK is None else rows_of(weights_NK) != 0

    def counted(experts_NK: Tensor, kept_NK: Tensor | None = None) -> Tensor:
        copies_NK = copies_N[:, None].expand(experts_NK.shape)
        copies_NK = copies_NK if kept_NK is None else copies_NK * kept_NK
        counts_E = torch.zeros_like(logits_NE[0])
        return counts_E.index_add_(0, experts_NK.flatten(), copies_NK.flatten())

    experts = [counted(chosen_NK, kept_NK), counted(picked_NK), copies_N @ mass_NE]
    tokens, choices = copies_N.sum(), chosen_NK.shape[-1]
    entropy_N = -(mass_NE * logp_NE).sum(-1)
    dropped = copies_N @ (1 - kept_NK.float()).sum(-1)
    layers = [tokens, copies_N @ entropy_N, tokens * choices, dropped]
    return torch.stack(experts).double(), torch.stack(layers).double()


def rows_of(values: Tensor) -> Tensor:
    """Values of tokens as a matrix, a row for each."""
    return values.reshape(-1, values.shape[-1])


def _choices(logits: Tensor, output: Any, top_k: int) -> tuple[Tensor | None, Tensor | None, int]:
    """Experts that a router chooses for each token, their weights, and how many. None: not told."""
    others = () if isinstance(output, Tensor) else output
    told = [each for each in others if _of_choices(each, len(rows_of(logits)), top_k)]
    chosen = [rows_of(each) for each in told if not each.is_floating_point()]
    weights = [each for each in told if each.is_floating_point()]
    if not chosen:
        return None, None, top_k
    return chosen[0], weights[0] if weights else None, top_k


def _of_choices(value: Any, tokens: int, top_k: int) -> bool:
    """Whether an output has a number for every choice of every token."""
    return (
        isinstance(value, Tensor)
        and value.dim() > 1
        and value.shape[-1] == top_k
        and (value.numel() == tokens * top_k)
    )


def routers_of(model: PreTrainedModel) -> Iterator[tuple[nn.Module, int]]:
    """The routers of a model from first to last, and the place of the logits in what each returns."""
    decoder = decoder_of(model)
    marks = (getattr(decoder, "_can_record_outputs", None) or {}).get("router_logits", ())
    marks = marks if isinstance(marks, (list, tuple)) else (marks,)
    for name, module in decoder.named_modules():
        for mark in marks:
            if _marked(mark, f".{name}.", module):
                yield module, getattr(mark, "index", 1)
                break


def _marked(mark: Any, name: str, module: nn.Module) -> bool:
    """Whether transformers means a module. mark: an `OutputRecorder`, or a class."""
    kind = getattr(mark, "target_class", mark)
    if kind is None or not isinstance(module, kind):
        return False
    layer = getattr(mark, "layer_name", None)
    return layer is None or f".{layer.strip('.')}." in name


def top_k_of(model: PreTrainedModel, router: nn.Module | None = None) -> int:
    """Experts that compute a token, as the model's configuration or else the router has it."""
    config = model.config.get_text_config()
    parts = (config, getattr(config, "ffn_config", None), router)
    names = ("num_experts_per_tok", "moe_top_k", "top_k_experts", "top_k")
    found = (getattr(part, name, None) for part in parts for name in names)
    return next((each for each in found if isinstance(each, int)), 1)
