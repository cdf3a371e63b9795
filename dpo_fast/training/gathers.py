"""What ZeRO 3 gathers in a micro-batch: DeepSpeed's rules of fetching and releasing, followed on paper.

A module's parameters are gathered before it runs and released after it, in forward and in backward. They
stay if the order of modules, which DeepSpeed records in the first steps, has them again within
`max_reuse_distance` elements, or if a prefetch has looked past their next use
(deepspeed/runtime/zero/partitioned_param_coordinator.py, 0.19). Small ones are never released.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass

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
    """A module in the order that DeepSpeed records: the parameters that it has itself, by their ids."""

    own: tuple[int, ...]


def order_of(model: ScoringModel, checkpointed: Sequence[int]) -> tuple[list[Use], dict[int, int]]:
    """The modules of a forward and its backward in their order, and the elements of every parameter.

    model: on the meta device, or loaded.
    checkpointed: numbers of the layers that run again in the backward pass.

    What comes before the first trained parameter has no backward pass.
    """
    causal_lm, sizes = model.causal_lm, {}
    head, layers = causal_lm.get_output_embeddings(), decoder_layers(causal_lm)
    blocks: list[tuple[list[nn.Module], bool]] = []
    again = {id(layers[index]) for index in checkpointed}
    inside = {id(part): number for number, layer in enumerate(layers) for part in layer.modules()}
    last = None
    parts, heads = set(head.modules()), _running(head)
    for module in _running(decoder_of(causal_lm)):
        if module in parts:
            continue
        number = inside.get(id(module))
        if number is None or number != last:
            blocks.append(([], number is not None and id(layers[number]) in again))
        blocks[-1][0].append(module)
        last = number
    blocks.append((heads, False))
    seen_trained, backward = False, []
    for modules, recomputed in blocks:
        live = []
        for module in modules:
            for parameter in _own(module):
                sizes[id(parameter)] = getattr(parameter, "ds_numel", parameter.numel())
                seen_trained |= parameter.requires_grad
            if seen_trained:
                live.append(_use(module))
        if live:
            first = [_use(module) for module in modules] if recomputed else []
            backward.append([*first, *reversed(live)])
    forward = [_use(module) for modules, _ in blocks for module in modules]
    return forward + [use for block in reversed(backward) for use in block], sizes


def _running(root: nn.Module) -> list[nn.Module]:
    """Its modules with parameters of their own, without those that an adapter has replaced."""
    named = root.named_modules()
    return [module for name, module in named if _own(module) and "original_module" not in name]


def _use(module: nn.Module) -> Use:
    return Use(tuple(map(id, _own(module))))


def _own(module: nn.Module) -> list[nn.Parameter]:
    return list(module.parameters(recurse=False))


def gathered(
    order: Sequence[Use], sizes: dict[int, int], rules: Rules, held: set[int] = frozenset()
) -> tuple[Counter, set[int]]:
    """How often a micro-batch gathers each parameter, by its id, and which it leaves gathered.

    held: those that the micro-batch before has left.
    """
    there, counts = set(held), Counter()
    small = {key for key, size in sizes.items() if size <= rules.persistence}
    there |= small
    queue = deque((key, step) for step, use in enumerate(order) for key in use.own)
    fetched_for = dict.fromkeys(sizes, -1)
    live = 0
    for step, use in enumerate(order):
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
            if key in there and key not in small and fetched_for[key] <= step + 1:
                there.discard(key)
                live -= sizes[key]
    return counts, there - small


def _released(
    order: Sequence[Use], sizes: dict[int, int], rules: Rules, following: int
) -> set[int]:
    """Parameters of the module before place `following` that do not come again soon."""
    own, passed = set(order[following - 1].own), 0
    for use in order[following:]:
        if passed >= rules.reuse or not own:
            break
        own.difference_update(use.own)
        passed += sum(sizes[key] for key in use.own)
    return own
