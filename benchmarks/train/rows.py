"""Rows of `bench train`: one per contender, with versions, device, commit and date in each."""

from __future__ import annotations

from statistics import median

from benchmarks.machine import environment, version
from benchmarks.rows import Columns
from benchmarks.times import summary
from benchmarks.train.case import WARM_UP, Task
from benchmarks.train.measure import Result
from benchmarks.train.model import Sizes

BASE, BASE_STORED = "trl", "trl, precomputed"
NUMBERS = (
    "parameters",
    "global_batch_size",
    "micro_batch_size",
    "rounds",
    "s_p20",
    "s_p50",
    "s_p80",
    "pairs_per_s",
    "tokens_per_s",
    "x_of_trl",
    "x_of_trl_precomputed",
    "mfu",
    "mfu_once",
    "matmul_tflops",
    "data_tokens",
    "once_tokens",
    "scored_tokens",
    "computed_tokens",
    "flops",
    "flops_once",
    "head_share",
    "reference_share",
    "reference_seconds",
    "peak_mib",
    "first_loss",
    "last_loss",
    "loss_err",
)
COLUMNS = Columns(
    names=(
        "impl",
        "model",
        "dtype",
        "data",
        "layout",
        "reference",
        "checkpointing",
        *NUMBERS,
        "max_length",
        "zero_stage",
        "device",
        "threads",
        "torch",
        "triton",
        "transformers",
        "deepspeed",
        "trl",
        "driver",
        "commit",
        "date",
        "note",
    ),
    numbers=frozenset(NUMBERS),
)


def rows_of(
    results: list[Result], task: Task, model: str, data: str, sizes: Sizes, matmul: float
) -> list[dict]:
    """matmul: flops a second of the bare product."""
    shared = _shared(task, model, data, sizes, matmul)
    rows = [
        shared | _told(result, task) | ({} if result.note else _measured(result, task, matmul))
        for result in results
    ]
    for base, column in ((BASE, "x_of_trl"), (BASE_STORED, "x_of_trl_precomputed")):
        seconds = {row["impl"]: row.get("s_p50") for row in rows}.get(base)
        for row in rows:
            if seconds and "s_p50" in row:
                row[column] = seconds / row["s_p50"]
    return [COLUMNS.row(row) for row in rows]


def _shared(task: Task, model: str, data: str, sizes: Sizes, matmul: float) -> dict:
    """What is the same in every row."""
    works = task.works[WARM_UP:]
    return environment(task.device) | {
        "model": model,
        "parameters": sizes.parameters,
        "data": data,
        "dtype": task.dtype,
        "global_batch_size": task.global_batch_size,
        "max_length": task.max_length,
        "matmul_tflops": matmul / 1e12,
        "rounds": len(works),
        "data_tokens": _mean(work.tokens for work in works),
        "once_tokens": _mean(work.once for work in works),
        "scored_tokens": _mean(work.scored for work in works),
        "flops": _mean(work.flops for work in works),
        "flops_once": _mean(work.flops_once for work in works),
        **{name: version(name) for name in ("transformers", "deepspeed", "trl")},
    }


def _told(result: Result, task: Task) -> dict:
    """What a contender is, and how it was checked, timed or not."""
    contender, losses = result.contender, result.losses
    return {
        "impl": contender.name,
        "layout": contender.layout or "padded",
        "reference": "stored" if contender.stored else "live",
        "checkpointing": "yes" if contender.checkpointing else "no",
        "micro_batch_size": task.micro_batch_size(contender.layout),
        "zero_stage": task.zero_stage if contender.ours else "",
        "first_loss": losses[0] if losses else "",
        "last_loss": losses[-1] if losses else "",
        "loss_err": result.loss_err,
        "note": result.note,
    }


def _measured(result: Result, task: Task, matmul: float) -> dict:
    works, times = task.works[WARM_UP:], summary(result.seconds)

    def rate(count) -> float:
        """Median over the rounds of what `count` finds in a step's work, by the second."""
        return median(count(work) / s for work, s in zip(works, result.seconds))

    return {
        "s_p20": times.p20,
        "s_p50": times.p50,
        "s_p80": times.p80,
        "pairs_per_s": task.global_batch_size / times.p50,
        "tokens_per_s": rate(lambda work: work.tokens),
        "mfu": rate(lambda work: work.flops) / matmul,
        "mfu_once": rate(lambda work: work.flops_once) / matmul,
        "computed_tokens": _mean(result.computed[step] for step in range(WARM_UP, task.steps)),
        "head_share": median(shares.get("head", 0.0) for shares in result.shares),
        "reference_share": median(shares.get("reference", 0.0) for shares in result.shares),
        "reference_seconds": result.reference_seconds,
        "peak_mib": result.peak_mib,
    }


def _mean(values) -> float:
    found = list(values)
    return sum(found) / len(found)
