"""Results of `bench train`: the columns of its rows, the printed tables, the pictures.

    python -m benchmarks.train.results [CSV ...] [--out FOLDER] [--format svg|png]

draws the pictures again, from CSV files and from nothing else: bars of pairs per second, and the seconds
of a step from ingredient to ingredient. Ingredients lead from TRL's default to our fastest step, along
CHAIN. A factor is the time before over the time after, so all factors multiply to the whole.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

from benchmarks import plots
from benchmarks.machine import environment, summary, version
from benchmarks.plots import bar, begin, colour, name_bars, save, short_device
from benchmarks.results import Column, Columns, header, line
from benchmarks.train.case import TRL_LAYOUT, WARM_UP, ModelSizes, Task
from benchmarks.train.measure import Result

BASE, BASE_STORED = "trl", "trl, precomputed"
NUMBERS = (
    "parameters global_batch_size micro_batch_size rounds s_p20 s_p50 s_p80 pairs_per_s tokens_per_s "
    "x_of_trl x_of_trl_precomputed mfu mfu_once matmul_tflops data_tokens once_tokens scored_tokens "
    "computed_tokens flops flops_once head_share reference_share reference_seconds peak_mib first_loss "
    "last_loss loss_err"
)
NAMES = (
    f"impl model dtype data layout reference checkpointing attention layers {NUMBERS} max_length "
    "zero_stage device capability threads torch triton transformers deepspeed trl driver commit date note"
)
COLUMNS = Columns.of(NAMES, NUMBERS)
SPLIT = "head and the rest of the step"
CHAIN = (  # what changes on the way to the contender
    ("", "trl"),
    ("no checkpointing", "trl, no checkpointing"),
    ("stored reference", "trl, precomputed, no checkpointing"),
    (SPLIT, "dpo_fast padded, cached"),
    ("no padding", "dpo_fast packed, cached"),
    ("each prompt once", "dpo_fast shared_prefix, cached"),
)


def rows_of(
    results: list[Result], task: Task, model: str, data: str, sizes: ModelSizes, matmul: float
) -> list[dict]:
    """A row for each contender. matmul: flops per second of the bare product."""
    shared = _shared(task, model, data, sizes, matmul)
    rows = [
        shared | _checked(result, task) | ({} if result.note else _measured(result, task, matmul))
        for result in results
    ]
    for base, column in ((BASE, "x_of_trl"), (BASE_STORED, "x_of_trl_precomputed")):
        seconds = {row["impl"]: row.get("s_p50") for row in rows}.get(base)
        for row in rows:
            if seconds and "s_p50" in row:
                row[column] = seconds / row["s_p50"]
    return [COLUMNS.row(row) for row in rows]


def _shared(task: Task, model: str, data: str, sizes: ModelSizes, matmul: float) -> dict:
    """What is the same in every row."""
    works = task.works[WARM_UP:]
    return environment(task.device) | {
        "model": model,
        "parameters": sizes.parameters,
        "data": data,
        "dtype": task.dtype,
        "global_batch_size": task.global_batch_size,
        "max_length": task.max_length,
        "layers": "liger" if task.liger else "eager",
        "matmul_tflops": matmul / 1e12,
        "rounds": len(works),
        "data_tokens": fmean(work.tokens for work in works),
        "once_tokens": fmean(work.once for work in works),
        "scored_tokens": fmean(work.scored for work in works),
        "flops": fmean(work.flops for work in works),
        "flops_once": fmean(work.flops_once for work in works),
        **{name: version(name) for name in ("transformers", "deepspeed", "trl")},
    }


def _checked(result: Result, task: Task) -> dict:
    """What a contender is, and its check. Every row has them, timed or not."""
    contender, losses = result.contender, result.losses
    return {
        "impl": contender.name,
        "layout": contender.layout or TRL_LAYOUT,
        "reference": "stored" if contender.stored else "live",
        "checkpointing": "yes" if contender.checkpointing else "no",
        "attention": result.attention,
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
        """count(work) per second, median over the rounds."""
        return median(count(work) / s for work, s in zip(works, result.seconds))

    return {
        "s_p20": times.p20,
        "s_p50": times.p50,
        "s_p80": times.p80,
        "pairs_per_s": task.global_batch_size / times.p50,
        "tokens_per_s": rate(lambda work: work.tokens),
        "mfu": rate(lambda work: work.flops) / matmul,
        "mfu_once": rate(lambda work: work.flops_once) / matmul,
        "computed_tokens": fmean(result.computed[step] for step in range(WARM_UP, task.steps)),
        "head_share": median(shares.get("head", 0.0) for shares in result.shares),
        "reference_share": median(shares.get("reference", 0.0) for shares in result.shares),
        "reference_seconds": result.reference_seconds,
        "peak_mib": result.peak_mib,
    }


@dataclass(frozen=True)
class Ingredient:
    """A factor of the whole, and the seconds of a step after it.

    The first of a list is the start: the name of a contender, and factor 1.
    """

    name: str
    factor: float
    seconds: float


def ingredients(rows: list[dict]) -> list[Ingredient]:
    """The start, and what makes it faster, in order; [] without two contenders of the chain.

    If a contender of the chain is missing, the ingredients on both sides of it are one.
    """
    timed = {row["impl"]: row for row in rows if row["s_p50"] != ""}
    before, names, found = None, [], []
    for name, impl in CHAIN:
        names.append(name)
        if impl not in timed:
            continue
        row = timed[impl]
        if before is None:
            found.append(Ingredient(impl, 1.0, row["s_p50"]))
        elif names == [SPLIT]:
            found += _head_and_rest(before, row)
        else:
            joined = " + ".join(part for part in names if part)
            found.append(Ingredient(joined, before["s_p50"] / row["s_p50"], row["s_p50"]))
        before, names = row, []
    return found if len(found) > 1 else []


def _head_and_rest(before: dict, after: dict) -> list[Ingredient]:
    """The head: from TRL's step to one with our head in it. The rest: from there to our step."""
    saved = before["head_share"] * before["s_p50"] - after["head_share"] * after["s_p50"]
    between = before["s_p50"] - saved
    return [
        Ingredient("head", before["s_p50"] / between, between),
        Ingredient("rest of the step", between / after["s_p50"], after["s_p50"]),
    ]


def token_factors(rows: list[dict]) -> dict[str, float]:
    """Positions of a padded step over its tokens, and tokens over tokens with every prompt once."""
    found = {"repeated prompts": rows[0]["data_tokens"] / rows[0]["once_tokens"]}
    for row in rows:
        if row["layout"] == TRL_LAYOUT and row["computed_tokens"]:
            return {"padding": row["computed_tokens"] / row["data_tokens"]} | found
    return found


SHOWN = (
    Column("s p50", "s_p50", 8, "{:.3g}".format),
    Column("p20", "s_p20", 8, "{:.3g}".format),
    Column("p80", "s_p80", 8, "{:.3g}".format),
    Column("pairs/s", "pairs_per_s", 9, "{:.2f}".format),
    Column("tokens/s", "tokens_per_s", 10, "{:,.0f}".format),
    Column("x trl", "x_of_trl", 7, "{:.2f}".format),
    Column("x pre", "x_of_trl_precomputed", 7, "{:.2f}".format),
    Column("mfu", "mfu", 7, "{:.1%}".format),
    Column("once", "mfu_once", 7, "{:.1%}".format),
    Column("positions", "computed_tokens", 11, "{:,.0f}".format),
    Column("head", "head_share", 6, "{:.0%}".format),
    Column("ref", "reference_share", 6, "{:.0%}".format),
    Column("MiB", "peak_mib", 8, "{:,.0f}".format),
    Column("loss_err", "loss_err", 10, "{:.1e}".format),
)
HEADER = f"{'contender':<38}{header(SHOWN)}"


def table(rows: list[dict]) -> str:
    return "\n".join([HEADER, *map(_line, rows)])


def _line(row: dict) -> str:
    start = f"{row['impl']:<38}"
    return f"{start}  {row['note']}" if row["note"] else start + line(SHOWN, row)


def agreement(rows: list[dict]) -> str:
    """How far the losses moved, and how well they agree: agreement proves little if they did not move."""
    good = [row for row in rows if not row["note"]]
    if not good:
        return "no contender passed the check"
    first, last = good[0]["first_loss"], good[0]["last_loss"]
    worst = max(row["loss_err"] for row in good)
    return f"losses went from {first:.6f} to {last:.6f} and agree to {worst:.1e}"


def factors(rows: list[dict]) -> str:
    """The factors of tokens and, if contenders can be compared, of the ingredients."""
    found = ingredients(rows)
    counted = ", ".join(f"{name} {factor:.2f}" for name, factor in token_factors(rows).items())
    lines = [f"tokens, times what is needed: {counted}"]
    if found:
        lines += ["", f"{'ingredient':<48}{'factor':>8}{'s after':>9}"]
        lines += [f"{i.name:<48}{i.factor:>8.2f}{i.seconds:>9.3g}" for i in found]
        lines.append(f"{'all together':<48}{found[0].seconds / found[-1].seconds:>8.2f}")
    return "\n".join(lines)


def draw(files: list[Path], folder: Path, form: str = "svg") -> list[Path]:
    """Draw bars of pairs/s for each file, and ingredients if the rows have them; returns the paths."""
    begin()
    folder.mkdir(parents=True, exist_ok=True)
    return [path for file in files for path in _draw(file, folder, form)]


def _draw(file: Path, folder: Path, form: str) -> list[Path]:
    rows = COLUMNS.read(file)
    end = f"{rows[0]['model']}_{short_device(rows[0]['device'])}_{file.stem}"
    paths = [save(_bars(rows), folder / f"pairs_{end}.{form}")]
    if ingredients(rows):
        paths.append(save(_ingredients(rows), folder / f"ingredients_{end}.{form}"))
    return paths


def _title(rows: list[dict]) -> str:
    row = rows[0]
    batch = f"global batch {row['global_batch_size']:.0f}"
    return f"{row['model']}, {row['dtype']}, {row['device']}, {batch}\n{row['data']}"


def _bars(rows: list[dict]):
    import matplotlib.pyplot as plt

    timed = [row for row in rows if not row["note"]]
    rest = [row for row in rows if row["note"]]
    figure, axis = plt.subplots(figsize=(8.4, 1.1 + 0.24 * len(rows)), layout="constrained")
    for place, row in enumerate(timed + rest):
        bar(axis, place, row["pairs_per_s"] or 0.0, row["impl"], _caption(row))
    name_bars(axis, [row["impl"] for row in timed + rest], size=8)
    axis.set_xlim(0, 1.6 * max((row["pairs_per_s"] for row in timed), default=1.0))
    axis.set_xlabel("pairs a second, median")
    axis.set_title(_title(rows), fontsize=9, loc="left")
    return figure


def _caption(row: dict) -> str:
    if row["note"]:
        return row["note"].split(":")[0]
    times = f", {row['x_of_trl']:.1f} x trl" if row["x_of_trl"] != "" else ""
    peak = f", {row['peak_mib']:,.0f} MiB" if row["peak_mib"] != "" else ""
    return f"{row['pairs_per_s']:.3g}{times}, {row['tokens_per_s']:,.0f} tokens/s{peak}"


def _ingredients(rows: list[dict]):
    """Seconds of a step, ingredient after ingredient."""
    import matplotlib.pyplot as plt

    found = ingredients(rows)
    figure, axis = plt.subplots(figsize=(7.2, 0.9 + 0.34 * len(found)), layout="constrained")
    for place, (before, part) in enumerate(zip([found[0], *found], found)):
        name = "dpo_fast" if place else part.name
        axis.barh(place, before.seconds, color="#c9d8f5", height=0.66)
        axis.barh(place, part.seconds, color=colour(name), height=0.66)
        factor = f" x {part.factor:.2f}," if place else ""
        caption = f"{factor} {part.seconds:.3g} s"
        axis.text(max(before.seconds, part.seconds), place, caption, va="center", fontsize=8)
    name_bars(axis, [part.name for part in found], size=8)
    axis.set_xlim(0, 1.3 * max(part.seconds for part in found))
    axis.set_xlabel("seconds a step, median; pale: what the ingredient saves")
    axis.set_title(_title(rows), fontsize=9, loc="left")
    return figure


def main(arguments: list[str] | None = None) -> int:
    return plots.command("train", __doc__.split("\n")[0], draw, arguments)


if __name__ == "__main__":
    sys.exit(main())
