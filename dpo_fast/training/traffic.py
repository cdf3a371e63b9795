"""The bytes that ranks exchange in an optimiser step, counted from sizes alone.

A collective of `n` ranks over a tensor of `B` bytes makes each rank send, with the ring algorithms that
NCCL and gloo use for large tensors (Patarasuk and Yuan, 2009):

all-gather, reduce-scatter   B (n - 1) / n
all-reduce                   2 B (n - 1) / n

Of an all-to-all, where B is what each rank has, it sends B (n - 1) / n. `exchanges.py` counts those.

What DeepSpeed exchanges, by stage of ZeRO (Rajbhandari et al., 2020, section 7; what 0.19 does of it):

0     gradients: an all-reduce a step
1     gradients: an all-reduce a step; weights: an all-gather a step
2     gradients: an all-reduce a micro-batch, of which a rank keeps its part; weights: an all-gather a step
3     parameters: all-gathers in every micro-batch (`gathers.py`), and in every forward without a backward,
      of the policy or of a reference that is sharded beside it; gradients: a reduce-scatter a micro-batch

Sums of a few numbers (gradient norm, metrics) are left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from dpo_fast.models import ScoringModel
from dpo_fast.training.config import RunConfig
from dpo_fast.training.gathers import Order, Rules, gathered, order_of
from dpo_fast.training.memory import FP32, elements

GATHER, SCATTER, REDUCE, EXCHANGE = "all-gather", "reduce-scatter", "all-reduce", "all-to-all"
SHARE = {
    GATHER: 1,
    SCATTER: 1,
    EXCHANGE: 1,
    REDUCE: 2,
}  # of (n - 1) / n of the tensor, which a rank sends
QUANTISED, SCALES = (
    1,
    FP32 / 8000,
)  # bytes of a gathered element with qwZ: int8, and a scale for 8,000


@dataclass(frozen=True)
class Transfer:
    """Collectives of one kind in a step.

    what: weights, gradients, ...
    kind: GATHER, SCATTER, REDUCE or EXCHANGE.
    ranks: of the group that takes part.
    payload: bytes of the whole tensors, over the step; of an exchange those of a rank.
    how: how the payload comes about, for people.
    """

    what: str
    kind: str
    ranks: int
    payload: float
    how: str

    @property
    def sent(self) -> float:
        """Bytes that a rank sends, and receives."""
        return SHARE[self.kind] * self.payload * (self.ranks - 1) / self.ranks


def traffic(
    config: RunConfig,
    zero: dict[str, Any],
    model: ScoringModel,
    checkpointed: Sequence[int],
    ranks: int,
    micro_batches: int,
    references: Iterable[ScoringModel] = (),
) -> list[Transfer]:
    """What a rank exchanges in an optimiser step; [] for a single rank.

    config: with the choices that were made in place of `auto`.
    zero: DeepSpeed's section `zero_optimization`.
    model: on the meta device, or loaded.
    checkpointed: numbers of the layers that run again in the backward pass.
    micro_batches: of each rank in a step.
    references: models beside the policy that score every batch, in the state of `model`.
    """
    if ranks == 1:
        return []
    stage, size = config.zero_stage, config.model.torch_dtype.itemsize
    trained = elements(model, trainable=True)
    if stage == 3:
        own, beside = passes_of(config, micro_batches)
        found = _gathers(model, zero, order_of(model, checkpointed), own, ranks, size)
        for other in references:
            lines = _gathers(other, zero, order_of(other, []), beside, ranks, size)
            found += [replace(line, what=f"{line.what} of the reference") for line in lines]
        return found + _reduced(model, zero, ranks, micro_batches, size)
    # Stage 1 adds micro-batches up and reduces once; stage 2 reduces every one.
    times = micro_batches if stage == 2 else 1
    how = f"{trained:,} x {size} bytes" + (f" x {times} micro-batches" if times > 1 else "")
    found = [Transfer("gradients", REDUCE, ranks, trained * size * times, how)]
    if stage:
        padded = _padded_groups(model, ranks)
        found.append(
            Transfer("updated weights", GATHER, ranks, padded * size, f"{padded:,} x {size} bytes")
        )
    return found


def _padded_groups(model: ScoringModel, ranks: int) -> int:
    """Elements of the flat tensors of matrices and of vectors, which DeepSpeed pads to whole parts."""
    from dpo_fast.training.engine import split_trained

    total = 0
    for group in split_trained(model.parameters()):
        count, unit = sum(_numel(p) for p in group), 2 * ranks  # NCCL wants parts of 4 bytes
        total += -(-count // unit) * unit
    return total


class Passes(NamedTuple):
    """Passes of a model over micro-batches in a step.

    apart: forwards before all others. before: forwards with adapters off, each before one of `both`, so
    that their orders of modules come in turn. both: forwards with their backward.
    """

    apart: int
    before: int
    both: int


def passes_of(config: RunConfig, micro_batches: int) -> tuple[Passes, Passes]:
    """Those of the policy in a step, and those of a reference that scores beside it."""
    objective, balanced = config.loss.objective, bool(config.model.router_aux_loss_coef)
    kl = micro_batches if "kl" in objective.statistics else 0
    first = micro_batches if objective.coupled or (balanced and micro_batches > 1) else 0
    scored = micro_batches + kl if objective.needs_reference else 0
    itself = config.reference_spec.needs_adapters  # the policy with its adapters off
    policy = Passes(kl + first, scored if itself else 0, micro_batches)
    return policy, Passes(scored, 0, 0)


def _gathers(model, zero, order: Order, passes: Passes, ranks: int, size: int) -> list[Transfer]:
    """Parameters of ZeRO 3, with ZeRO++ where it is asked for."""
    sizes, rules = order.sizes, Rules.of(zero)
    if passes.before:
        # Two orders in turn: DeepSpeed has never a whole one to look ahead in, and releases at once.
        rules = replace(rules, reuse=0, prefetch=0)
    each_pass, held = [], set()
    uses = order.uses if passes.both else order.uses[: order.forward]
    for until in [order.forward] * (passes.apart + passes.before) + [None] * passes.both:
        once, held = gathered(uses, sizes, rules, held, until)
        each_pass.append(once)
    padded = {key: -(-sizes[key] // ranks) * ranks for key in sizes}
    trained = {id(p) for p in model.parameters() if p.requires_grad and passes.both}
    first, later = _split_by_group(each_pass, zero, trained)
    each, name = (size, "") if not zero.get("zero_quantized_weights") else (QUANTISED, ", 8 bits")
    found = []
    for group, share in ((ranks, first), (int(zero.get("zero_hpz_partition_size", 1)), later)):
        total = sum(padded[key] * times for key, times in share.items())
        if total and group > 1:
            within = "" if group == ranks else f", of {group} ranks"
            scales = total * SCALES if each == QUANTISED else 0
            how = f"{total:,} x {each} bytes: {_times(total, padded)} a step"
            found.append(
                Transfer(f"parameters{name}{within}", GATHER, group, total * each + scales, how)
            )
    if not passes.both:  # nothing updates them
        return found
    all_sizes = map(_numel, model.parameters())  # also of parts that a text does not go through
    small = sum(-(-n // ranks) * ranks for n in all_sizes if n <= rules.persistence)
    if small:
        how = f"{small:,} x {size} bytes, which are small and stay whole"
        found.append(Transfer("small parameters", GATHER, ranks, small * size, how))
    return found


def _times(total: int, padded: dict[int, int]) -> str:
    return f"{total / max(sum(padded.values()), 1):.2f} times all parameters"


def _split_by_group(
    passes: list[Counter], zero: dict, trained: set[int]
) -> tuple[Counter, Counter]:
    """Gathers over all ranks, and those within hpZ's groups: all but the first of a step.

    trained: ids of parameters that an update changes. The copies of others stay good for the whole run.
    """
    counts = sum(passes, Counter())
    if int(zero.get("zero_hpz_partition_size", 1)) == 1:
        return counts, Counter()
    first = Counter(dict.fromkeys(trained & counts.keys(), 1))
    return first, counts - first


def _reduced(model, zero, ranks: int, micro_batches: int, size: int) -> list[Transfer]:
    trained = sum(-(-_numel(p) // ranks) * ranks for p in model.parameters() if p.requires_grad)
    total, times = trained * micro_batches, f" x {micro_batches} micro-batches"
    times = times if micro_batches > 1 else ""
    if zero.get("zero_quantized_gradients"):
        how = f"{trained:,} x 1/2 byte{times}, once within machines and once between"
        return [Transfer("gradients, 4 bits", SCATTER, ranks, total / 2, how)]
    return [
        Transfer("gradients", SCATTER, ranks, total * size, f"{trained:,} x {size} bytes{times}")
    ]


def _numel(parameter) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())
