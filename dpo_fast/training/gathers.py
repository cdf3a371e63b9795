"""What ZeRO 3 gathers in a micro-batch: DeepSpeed's rules of fetching and releasing, followed on paper.

A module's parameters are gathered before it runs and released after it, in forward and in backward. They
stay if the order of modules, which DeepSpeed records in the first steps, has them again within
`max_reuse_distance` elements, or if a prefetch has looked past their next use
(deepspeed/runtime/zero/partitioned_param_coordinator.py, 0.19). Small ones are never released.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import nn

from dpo_fast.models import ScoringModel
from dpo_fast.models.decoder import decoder_of
from dpo_fast.models.layers import decoder_layers


@dataclass(frozen=True)
class Rules:
    """The options of `zero_optimization` that decide what is gathered, in elements."""

    reuse: int
    prefetch: int
    live: int
    persistence: int

    @classmethod
    def of(cls, zero: dict) -> Rules:
        """From DeepSpeed's section `zero_optimization`; its own defaults where that is silent."""

        def value(name: str, default: float) -> int:
            return int(zero.get(f"stage3_{name}", zero.get(name, default)))

        return cls(
            reuse=value("max_reuse_distance", 1e9),
            prefetch=value("prefetch_bucket_size", 5e7),
            live=value("max_live_parameters", 1e9),
            persistence=value("param_persistence_threshold", 1e5),
        )


@dataclass(frozen=True)
class Use:
    """A module in the order that DeepSpeed records.

    own: the parameters that it has itself, by their ids.
    frozen: whether none of them is trained.
    released: whether they may go afterwards. What is trained and runs again waits for its backward pass.
    """

    own: tuple[int, ...]
    frozen: bool = False
    released: bool = True


class Order(NamedTuple):
    """The modules of a forward and its backward in their order.

    forward: how many of them are of the forward pass.
    sizes: elements of every parameter, by its id.
    """

    uses: list[Use]
    forward: int
    sizes: dict[int, int]


def order_of(model: ScoringModel, checkpointed: Sequence[int]) -> Order:
    """What runs in a forward of a model and its backward.

    model: on the meta device, or loaded.
    checkpointed: numbers of the layers that run again in the backward pass.
    """
    causal_lm = model.causal_lm
    layers = decoder_layers(causal_lm)
    walk = _Walk({id(layers[index]) for index in checkpointed})
    parts = [walk.of(part) for part in (decoder_of(causal_lm), causal_lm.get_output_embeddings())]
    backward = [use for _, own in reversed(parts) for use in own]
    forward = [Use(()), *parts[0][0], *parts[1][0]]
    return Order([*forward, Use(()), *backward], len(forward), walk.sizes)


class _Walk:
    """Goes through modules in the order in which they are registered, as most models run them.

    again: ids of the modules that run again in the backward pass.
    sizes: elements of every parameter that was met, by its id.
    trained: whether one of them is trained. What comes before has no backward pass.
    """

    def __init__(self, again: set[int]) -> None:
        self.again, self.sizes, self.trained = again, {}, False
        self.met: set[int] = set()

    def of(self, module: nn.Module) -> tuple[list[Use], list[Use]]:
        """Forward and backward of a module. DeepSpeed also looks ahead at those without parameters."""
        parameters = list(module.parameters(recurse=False))
        for parameter in parameters:
            self.sizes[id(parameter)] = getattr(parameter, "ds_numel", parameter.numel())
            self.trained |= parameter.requires_grad
        runs = not isinstance(module, (nn.ModuleList, nn.ModuleDict))
        frozen = not any(parameter.requires_grad for parameter in parameters)
        own = [Use(tuple(map(id, parameters)), frozen)] if runs else []
        forward, backward = list(own), []
        for name, child in module.named_children():
            if name != "original_module" and id(child) not in self.met:
                self.met.add(id(child))
                first, then = self.of(child)
                forward, backward = forward + first, then + backward
        # Rotary embeddings and the like: their outputs have no gradient.
        constant = (
            next(module.parameters(), None) is None and next(module.buffers(), None) is not None
        )
        if self.trained and not constant:
            backward = own + backward
        if id(module) in self.again and backward:
            backward = [replace(use, released=use.frozen) for use in forward] + backward
        return forward, backward


def gathered(
    order: Sequence[Use],
    sizes: dict[int, int],
    rules: Rules,
    held: set[int] = frozenset(),
    until: int | None = None,
) -> tuple[Counter, set[int]]:
    """How often a micro-batch gathers each parameter, by its id, and which it leaves gathered.

    held: those that the micro-batch before has left.
    until: uses that come to pass, of a forward that no backward follows. What the order has behind them
        is looked ahead to all the same.
    """
    there, counts = set(held), Counter()
    small = {key for key, size in sizes.items() if size <= rules.persistence}
    there |= small
    queue = deque((key, step) for step, use in enumerate(order) for key in use.own)
    fetched_for = dict.fromkeys(sizes, -1)
    live = 0
    for step, use in enumerate(order[:until]):
        for key in use.own:
            if key not in there:
                counts[key] += 1
                live += sizes[key]
        there.update(use.own)
        pending = {key for key in use.own if fetched_for[key] < step}
        while queue and pending:
            key, used = queue.popleft()
            fetched_for[key] = used
            pending.discard(key)
        room, ahead = min(rules.live - live, rules.prefetch), 0
        while queue and ahead < room:
            key, used = queue.popleft()
            fetched_for[key] = max(fetched_for[key], used)
            if key not in there:
                counts[key] += 1
                there.add(key)
                ahead += sizes[key]
                live += sizes[key]
        for key in _released(order, sizes, rules, step + 1):
            if key in there and key not in small and fetched_for[key] <= step:
                there.discard(key)
                live -= sizes[key]
    return counts, there - small


def _released(
    order: Sequence[Use], sizes: dict[int, int], rules: Rules, following: int
) -> set[int]:
    """Parameters of the module before place `following` that do not come again soon."""
    own, passed = set(order[following - 1].own) if order[following - 1].released else set(), 0
    for use in order[following:]:
        if passed >= rules.reuse or not own:
            break
        own.difference_update(use.own)
        passed += sum(sizes[key] for key in use.own)
    return own
