"""What ranks exchange in a step of a run, and when ZeRO++ and NVMe pay, with this run's numbers.

`outlook` is the `Outlook` of `doctor_run.py`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from rich.table import Table

from dpo_fast.models.layers import checkpointed_layers
from dpo_fast.modules.metrics import METRIC_EXTRAS
from dpo_fast.training.engine import zero_config
from dpo_fast.training.exchanges import exchanges
from dpo_fast.training.memory import FP32, in_units
from dpo_fast.training.memory_plan import shape_of
from dpo_fast.training.prepare import wants_checkpointing
from dpo_fast.training.traffic import GATHER, Transfer, traffic

DISK = 6e9  # bytes a second of a fast NVMe disk, to read or write


def transfers(outlook, **other: object) -> list[Transfer]:
    """What a rank exchanges in a step. other: options of `zero_optimization` in place of the run's."""
    config, model = outlook.choices.applied(outlook.config), outlook.policy
    again = []
    if wants_checkpointing(config, model):
        again = checkpointed_layers(model.causal_lm, config.model.checkpoint_layers)
    zero, batches = zero_config(config) | other, micro_batches(outlook)
    stored = config.stored_models
    beside = [each for which, each in outlook.second_models.items() if which not in stored]
    found = traffic(config, zero, model, again, outlook.world, batches, beside)
    shape = shape_of(config, outlook.choices.layout.name, outlook.device.type == "cpu")
    tokens, scored = shape.sequences * shape.length * batches, outlook.scored_tokens * batches
    outputs = 1 + (len(METRIC_EXTRAS) if config.log.token_metrics else 0)
    sizes = (tokens, scored, outputs, batches)
    return found + exchanges(config, model, again, *sizes, references=beside)


def micro_batches(outlook) -> int:
    """Of a rank in a step; 1 where the data decide."""
    train = outlook.config.train
    if train.micro_batch_size is None:
        return 1
    batches = outlook.world // outlook.config.parallel.sequence_parallel  # at a time
    return train.global_batch_size // (train.micro_batch_size * batches)


def traffic_table(outlook) -> Table:
    """The collectives of a step and the bytes that a rank sends in them."""
    steps = "step" if outlook.config.train.micro_batch_size else "micro-batch"
    title = f"Communication of a {steps}, by what DeepSpeed does"
    caption = "Sums of a few numbers (gradient norm, metrics) are left out."
    if outlook.config.parallel.sequence_parallel > 1:
        caption += " What a row's ranks exchange is that of the longest."
    table = Table("what", "collective", "ranks", "bytes", "a rank sends", "how", title=title)
    table.caption = caption
    lines = transfers(outlook)
    for line in lines:
        sent, payload = in_units(line.sent), in_units(line.payload)
        table.add_row(line.what, line.kind, str(line.ranks), payload, sent, line.how)
    table.add_row("together", "", "", "", in_units(sum(line.sent for line in lines)), "")
    return table


def when_they_pay(outlook) -> Iterator[tuple[str, str, str, str]]:
    """Name, option, value and reason of every option of ZeRO that trades one resource for another.

    Those that are off are told where the run could use them: at stage 3, on several ranks.
    """
    zero = zero_config(outlook.config)
    if zero["stage"] == 3 and outlook.world > 1:
        yield "ZeRO++ hpZ", "zero_hpz_partition_size", *_copies(outlook, zero)
        yield "ZeRO++ qwZ", "zero_quantized_weights", *_quantised_weights(outlook, zero)
        yield "ZeRO++ qgZ", "zero_quantized_gradients", *_quantised_gradients(outlook, zero)
    if outlook.config.parallel.offload_optimizer == "nvme":
        yield "NVMe", "offload_optimizer", "optimiser", _disk(outlook)


def _copies(outlook, zero: dict) -> tuple[str, str]:
    size = int(zero.get("zero_hpz_partition_size", 1))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", outlook.world))
    machine = size if size > 1 else local if outlook.world % local == 0 else 1
    weights = outlook.sizes.parameters * outlook.config.model.torch_dtype.itemsize
    if outlook.world <= machine or machine == 1:
        return _on(size > 1, f"{size} ranks"), "pays where ranks lie on several machines"
    without = _crossing(outlook, transfers(outlook, zero_hpz_partition_size=1))
    with_it = _crossing(outlook, transfers(outlook, zero_hpz_partition_size=machine))
    return _on(size > 1, f"{size} ranks"), (
        f"with groups of {machine} ranks {in_units(with_it)} of parameters cross machines in a step in "
        f"place of {in_units(without)}, for {in_units(weights / machine)} more on every device"
    )


def _crossing(outlook, lines: list[Transfer]) -> float:
    """Bytes of gathers that a rank sends in groups of all ranks."""
    return sum(x.sent for x in lines if x.kind == GATHER and x.ranks == outlook.world)


def _quantised_weights(outlook, zero: dict) -> tuple[str, str]:
    on = bool(zero.get("zero_quantized_weights"))
    plain = sum(x.sent for x in transfers(outlook, zero_quantized_weights=False))
    small = sum(x.sent for x in transfers(outlook, zero_quantized_weights=True))
    return _on(on), (
        f"a rank sends {in_units(small)} in place of {in_units(plain)}; log-probs are those of weights "
        "rounded to 8 bits. Pays where gathering takes longer than computing"
    )


def _quantised_gradients(outlook, zero: dict) -> tuple[str, str]:
    on = bool(zero.get("zero_quantized_gradients"))
    plain = sum(x.sent for x in transfers(outlook, zero_quantized_gradients=False))
    small = sum(x.sent for x in transfers(outlook, zero_quantized_gradients=True))
    return _on(on), (
        f"a rank sends {in_units(small)} in place of {in_units(plain)}; gradients are rounded to 4 bits. "
        "Pays on several machines with a slow network"
    )


def _disk(outlook) -> str:
    states = 3 * FP32 * outlook.sizes.trainable / outlook.world
    seconds = 2 * states / DISK
    return (
        f"{in_units(states)} of a rank are read and written in every step, {seconds:.1f} s at 6 GB/s each "
        "way where a rank has a disk for itself. Pays only where CPU memory does not hold them"
    )


def _on(value: bool, text: str = "on") -> str:
    return text if value else "off"
