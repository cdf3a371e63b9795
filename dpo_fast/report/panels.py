"""The panels of the report: a table of what is plotted, and a panel of each row for one run or several."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from dpo_fast.numbers import number, percent
from dpo_fast.report.chart import Curve, Mark, Panel, thin
from dpo_fast.report.read import RunRecord

MOST_MARKS = 8
MOST_POINTS = 6000  # of all runs in one panel
BETA = "\N{GREEK SMALL LETTER BETA}"
SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class Plan:
    """A panel that any run can fill.

    name: of the metric; with `{side}` in it there are two, chosen and rejected.
    unit: what it is measured in. `{kind}` in texts is pairs, completions or groups.
    include, limits, rules: as of a panel. zero: the axis reaches 0, and ends there if nothing is below.
    share: a number from 0 to 1.
    """

    title: str
    name: str
    note: str
    unit: str = ""
    tone: str = "plain"
    rules: tuple[tuple[float, str], ...] = ()
    include: tuple[float, ...] = ()
    zero: bool = False
    share: bool = False
    noisy: bool = True


ZERO = ((0.0, ""),)
LEARNING = (
    Plan("Loss", "loss", ""),
    Plan(
        "Accuracy",
        "rewards/accuracies",
        "How often the better answer has the greater reward.",
        rules=((0.5, "as good as chance"),),
        include=(0.5, 1.0),
        share=True,
    ),
    Plan(
        "Margin",
        "rewards/margins",
        "Reward of the chosen answer less that of the rejected one. It should grow.",
        "reward",
        rules=ZERO,
        include=(0.0,),
    ),
    Plan(
        "Rewards, chosen and rejected",
        "rewards/{side}",
        f"{BETA} times the log-ratio to the reference. They should part.",
        "reward",
        rules=ZERO,
        include=(0.0,),
    ),
    Plan(
        "Chosen log-probability",
        "logps/chosen",
        "Summed over the answer. A slow fall is usual with DPO.",
        "nats",
        "chosen",
    ),
    Plan(
        "Rejected log-probability",
        "logps/rejected",
        "Summed over the answer. It should fall, or fall faster.",
        "nats",
        "rejected",
    ),
    Plan(
        "KL",
        "kl",
        "Estimated divergence from the reference. It grows as the policy moves away.",
        "nats",
        zero=True,
    ),
    Plan(
        "Delta",
        "delta",
        "Mean reward so far: answers above it count as desirable, those below it as undesirable.",
        "reward",
        rules=ZERO,
        include=(0.0,),
    ),
    Plan(
        "Clipped tokens",
        "clip_ratio/region_mean",
        "Share of tokens whose probability ratio no longer counts.",
        zero=True,
        share=True,
    ),
    Plan(
        "Log-odds",
        "log_odds",
        "Of the chosen answer's mean token over the rejected one's. They should grow.",
        "nats",
        rules=ZERO,
        include=(0.0,),
    ),
)
RUNNING = (
    Plan(
        "Gradient norm",
        "grad_norm",
        "Before clipping. Lone spikes are harmless, a steady climb is not.",
        zero=True,
    ),
    Plan(
        "Learning rate",
        "learning_rate",
        "As scheduled, of the first parameter group.",
        zero=True,
        noisy=False,
    ),
    Plan(
        "Entropy",
        "entropy",
        "Of answer tokens. A collapse means the model grows certain of all it says.",
        "nats a token",
    ),
    Plan(
        "Token accuracy",
        "mean_token_accuracy",
        "Share of answer tokens that are the model's first choice.",
        share=True,
    ),
    Plan(
        "Balancing loss of the experts",
        "aux_loss",
        "Without its weight. In balance it is the number of experts that compute a token.",
    ),
    Plan(
        "Busiest expert",
        "router/load_max",
        "Its tokens over the mean of its layer, mean of the layers. 1 is balance.",
        include=(1.0,),
    ),
    Plan(
        "Unused experts",
        "router/unused",
        "Share of the experts that no token came to.",
        zero=True,
        share=True,
    ),
    Plan(
        "Router entropy",
        "router/entropy",
        "Of a token's softmax over the experts. A fall to 0 means that routers no longer weigh.",
        "nats",
    ),
    Plan(
        "Dropped choices",
        "router/dropped",
        "Share of the experts chosen with weight 0, which compute nothing.",
        zero=True,
        share=True,
    ),
    Plan(
        "{kind} per second",
        "perf/examples_per_second",
        "Over all ranks, between two log lines.",
        "{kind}/s",
        zero=True,
    ),
    Plan(
        "Tokens per second",
        "perf/tokens_per_second",
        "Over all ranks, without padding.",
        "tokens/s",
        zero=True,
    ),
    Plan(
        "Model flops utilisation",
        "perf/mfu",
        "Operations of forward and backward, over those of a product.",
        zero=True,
        share=True,
    ),
)
OTHER_NOTE = "As logged."


def panels(runs: Sequence[RunRecord], plans: Sequence[Plan]) -> list[Panel]:
    """The panels that have anything to show. Each run has its colour if there are several."""
    made = (_panel(runs, plan) for each in plans for plan in _for_runs(each, runs))
    return [panel for panel in made if panel.curves]


def other_panels(runs: Sequence[RunRecord]) -> list[Panel]:
    """Of every metric that no plan names, such as those of another version."""
    names = sorted(set(_others(runs)) - set(single_metrics(runs)))
    return panels(runs, [Plan(name, name, OTHER_NOTE) for name in names])


def single_metrics(runs: Sequence[RunRecord]) -> list[str]:
    """Those of them that every run has logged once at most: facts of the start."""
    return sorted(
        name
        for name in set(_others(runs))
        if all(len(run.train.get(name, ())) < 2 and name not in run.eval for run in runs)
    )


def _others(runs: Sequence[RunRecord]) -> Iterator[str]:
    known = {plan.name.format(side=side) for plan in (*LEARNING, *RUNNING) for side in SIDES}
    return (n for run in runs for n in (*run.train, *run.eval) if n not in known)


def marks(run: RunRecord) -> list[Mark]:
    """Where an epoch begins, but for the first, and where the run was resumed; of very many none."""
    resumed = [Mark(step, "resumed", "resumed") for step in run.resumed_at]
    resumed = resumed if len(resumed) <= MOST_MARKS else []
    if not run.epochs or run.epochs[-1][0] <= 0 or run.epochs[-1][1] <= 0:
        return resumed
    step, epoch = run.epochs[-1]
    inner = range(1, math.ceil(min(epoch, MOST_MARKS + 2) - 1e-6))
    if len(inner) > MOST_MARKS:
        return resumed
    return [Mark(step / epoch * index, f"epoch {index + 1}") for index in inner] + resumed


def _for_runs(plan: Plan, runs: Sequence[RunRecord]) -> Iterator[Plan]:
    """The plan as it is for these runs: several runs have a panel for each side."""
    kinds = {run.kind for run in runs}
    kind = kinds.pop() if len(kinds) == 1 else "examples"
    fill = {"kind": kind, "side": "{side}"}
    title = plan.title.format(**fill) if "{kind}" in plan.title else plan.title
    title = title[:1].upper() + title[1:] if "{kind}" in plan.title else title
    plan = replace(plan, title=title, unit=plan.unit.format(**fill))
    if "{side}" not in plan.name or len(runs) == 1:
        yield plan
        return
    for side in SIDES:
        title, name = f"{side.capitalize()} reward", plan.name.format(side=side)
        yield replace(plan, title=title, name=name)


def _panel(runs: Sequence[RunRecord], plan: Plan) -> Panel:
    rules, note = plan.rules, plan.note
    if plan.name == "loss":
        rules, note = _of_loss(runs)
    elif plan.name == "grad_norm":
        rules = _clipping(runs)
    include = (*plan.include, *((0.0,) if plan.zero else ()))
    include += tuple(value for value, _ in rules) if plan.name == "loss" else ()
    low = 0.0 if plan.zero or plan.share or plan.name == "entropy" else None
    return Panel(
        plan.title,
        note,
        _curves(runs, plan),
        rules,
        include,
        (low, 1.0 if plan.share else None),
        percent if plan.share else number,
        plan.share,
        plan.unit,
    )


def _curves(runs: Sequence[RunRecord], plan: Plan) -> list[Curve]:
    """Training and evaluation of every run, those that there are."""
    if len(runs) > 1:
        most = max(200, MOST_POINTS // len(runs))
        return [
            Curve(run.label, thin(points, most), run.tone, evaluation, noisy=plan.noisy, raw=False)
            for run in runs
            for evaluation, points in _both(run, plan.name)
        ]
    if "{side}" in plan.name:
        return [curve for side in SIDES for curve in _side(runs[0], plan, side)]
    return [
        Curve(name, points, plan.tone, evaluation, name, plan.noisy)
        for evaluation, points in _both(runs[0], plan.name)
        for name in ("eval" if evaluation else "train",)
    ]


def _side(run: RunRecord, plan: Plan, side: str) -> list[Curve]:
    """Only the last curve of a side has a label."""
    both = _both(run, plan.name.format(side=side))
    return [
        Curve(
            f"eval {side}" if evaluation else side,
            points,
            side,
            evaluation,
            side if place == len(both) - 1 else "",
        )
        for place, (evaluation, points) in enumerate(both)
    ]


def _both(run: RunRecord, name: str) -> list[tuple[bool, list[tuple[float, float]]]]:
    """(whether of the evaluation, points)"""
    sources = ((False, run.train), (True, run.eval))
    return [(evaluation, source[name]) for evaluation, source in sources if name in source]


def _of_loss(runs: Sequence[RunRecord]) -> tuple[Sequence[tuple[float, str]], str]:
    """Rules and note of the loss: ln 2 where that is its start."""
    objectives = {" + ".join(run.loss_names) for run in runs}
    if len(objectives) > 1:
        return (), "The objectives differ, so their losses do not compare."
    note = f"Objective: {objectives.pop() or 'as configured'}. "
    if all(run.starts_at_ln2 for run in runs):
        return ((math.log(2), "ln 2"),), note + "At the start it must be ln 2."
    return (), note + "It should fall."


def _clipping(runs: Sequence[RunRecord]) -> Sequence[tuple[float, str]]:
    """Where the gradient is clipped, if all runs agree."""
    limits = {str(run.setting("train", "max_grad_norm")): run for run in runs}
    value = runs[0].setting("train", "max_grad_norm")
    number_given = isinstance(value, (int, float)) and not isinstance(value, bool)
    if len(limits) > 1 or not number_given or value <= 0:
        return ()
    return ((float(value), "clipped here"),)
