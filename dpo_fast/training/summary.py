"""What a run is about to do, in a few lines: its rows and what became of them, its steps, its model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dpo_fast.data.report import DataReport
from dpo_fast.data.verdicts import Tally
from dpo_fast.models import ScoringModel
from dpo_fast.models.adapter_targets import expert_tensors
from dpo_fast.models.load import load_skeleton
from dpo_fast.ops.dispatch import choose_implementation
from dpo_fast.training import distributed
from dpo_fast.training.config import RunConfig
from dpo_fast.training.console import say
from dpo_fast.training.memory import head_plan, memory_line, sizes_of
from dpo_fast.training.splits import Split

REASONS = 3  # shown for rows that are left out; `dpo-fast data` has all


def tell_data(config: RunConfig, splits: Sequence[Split], total_steps: int) -> None:
    """Say what is trained on and for how long, before the model is loaded."""
    for line in data_lines(config, splits, total_steps):
        say(line)


def data_lines(config: RunConfig, splits: Sequence[Split], total_steps: int) -> Iterator[str]:
    """A line for each split, one for each thing done to its rows, and one for the steps."""
    for split in splits:
        report, read = split.examples.report, split.name == "train"
        if config.data.streaming and read:
            yield f"train: a stream of {report.kind}; of the first {report.rows_read:,} rows:"
        else:
            yield f"{split.name}: {len(split.examples):,} {report.kind}"
        if read or not report.held_out:  # a held-out split shares train's report
            yield from (f"  {fact}" for fact in _facts(report))
    epochs = splits[0].epochs(total_steps)
    length = f"{total_steps:,} steps" + (
        "" if epochs is None else f", {epochs:.3g} epoch{'' if epochs == 1 else 's'}"
    )
    train, world = config.train, distributed.world_size()
    size = f"{train.global_batch_size} {splits[0].examples.report.kind} a step"
    device = distributed.device().type
    where = f"{world} ranks" if world > 1 else "one rank"
    if (shared := config.parallel.sequence_parallel) > 1:
        where += f", {shared} to a micro-batch"
    yield (
        f"{length}, {size}, on {where} ({device}, {config.model.precision}, ZeRO "
        f"{config.zero_stage}); learning rate {config.learning_rate:.3g}, "
        f"{train.lr_scheduler_type}"
    )


def _facts(report: DataReport) -> Iterator[str]:
    """What was left out, and why; what was cut or changed."""
    for what, tally in (("bad", report.bad), ("dropped", report.dropped)):
        if tally.total:
            yield f"{tally.total:,} of {report.rows_read:,} rows {what}: {_reasons(tally)}"
    yield from report.notes()


def _reasons(tally: Tally) -> str:
    counts = sorted(tally.counts.items(), key=lambda item: -item[1])
    shown = ", ".join(f"{reason} ({count:,})" for reason, count in counts[:REASONS])
    return shown + (", ..." if len(counts) > REASONS else "")


def tell_model(model: ScoringModel) -> None:
    """Say how large the model is, and how much of it is trained."""
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    whole, trained = sum(size for size, _ in sizes), sum(size for size, grad in sizes if grad)
    part = "" if trained == whole else f", {_count(trained)} of them trained"
    say(f"{type(model.causal_lm).__name__} with {_count(whole)} parameters{part}")
    stacks = expert_tensors(model.causal_lm) if model.has_adapter else []
    if stacks and not any("experts" in n for n, p in model.named_parameters() if p.requires_grad):
        told = f"[{', '.join(stacks)}]"
        say(f"its experts have no adapters: model.lora.target_parameters={told} gives them some")


def skeletons_beside(config: RunConfig) -> dict:
    """The second models of the run, without weights. Before transformers is told to shard what it loads."""
    return {
        model: load_skeleton(model.section(config.model), model.named_by)
        for model in config.second_models
    }


def tell_memory(config: RunConfig, policy: ScoringModel, beside: dict) -> None:
    """Say what computes the head and why, and what a rank's memory goes to.

    beside: what `skeletons_beside` gives.
    """
    device, world = distributed.device(), distributed.world_size()
    choice = choose_implementation(
        "linear_logp", device, config.model.torch_dtype, config.train.implementation
    )
    say(f"head {choice.name}: {choice.reason}")
    workspace = head_plan(config, policy, choice.name, device).bytes
    say(
        memory_line(
            config, sizes_of(policy, beside, workspace, config.model.quantization), world, device
        )
    )


def _count(number: int) -> str:
    for unit, name in ((1e9, "billion"), (1e6, "million")):
        if number >= unit:
            return f"{number / unit:.3g} {name}"
    return f"{number:,}"
