"""The panels of the report: their curves, and a sentence on each."""

from __future__ import annotations

import math

from dpo_fast.numbers import percent
from dpo_fast.report.chart import Curve, Panel
from dpo_fast.report.read import RunRecord

MOST_EPOCH_MARKS = 8


def epoch_marks(run: RunRecord) -> list[tuple[float, str]]:
    """(step, text) where an epoch begins, but for the first; none where there are very many."""
    if not run.epochs or run.epochs[-1][0] <= 0 or run.epochs[-1][1] <= 0:
        return []
    step, epoch = run.epochs[-1]
    inner = range(1, math.ceil(min(epoch, MOST_EPOCH_MARKS + 2) - 1e-6))
    if len(inner) > MOST_EPOCH_MARKS:
        return []
    return [(step / epoch * index, f"epoch {index + 1}") for index in inner]


def learning_panels(run: RunRecord) -> list[Panel]:
    """Loss, rewards, log-probabilities and the estimates of losses, as far as they were logged."""
    panels = [
        _loss(run),
        Panel(
            "Accuracy",
            "Share of pairs whose chosen answer has the greater reward.",
            _both(run, "rewards/accuracies"),
            [(0.5, "as good as chance")],
            (0.5, 1.0),
            (0.0, 1.0),
            percent,
            percent=True,
        ),
        Panel(
            "Margin",
            "Reward of the chosen answer less that of the rejected one. It should grow.",
            _both(run, "rewards/margins"),
            [(0.0, "")],
            (0.0,),
        ),
        _rewards(run),
        Panel(
            "Chosen log-probability",
            "Nats, summed over the answer. A slow fall is usual with DPO.",
            _both(run, "logps/chosen", "chosen"),
        ),
        Panel(
            "Rejected log-probability",
            "Nats, summed over the answer. It should fall, or fall faster.",
            _both(run, "logps/rejected", "rejected"),
        ),
        Panel(
            "KL",
            "Estimated divergence from the reference, in nats. It grows as the policy moves away.",
            _both(run, "kl"),
            [],
            (0.0,),
            (0.0, None),
        ),
        Panel(
            "Delta",
            "Mean reward so far: answers above it count as desirable, those below it as undesirable.",
            _both(run, "delta"),
            [(0.0, "")],
            (0.0,),
        ),
        Panel(
            "Clipped tokens",
            "Share of tokens whose probability ratio no longer counts.",
            _both(run, "clip_ratio/region_mean"),
            [],
            (0.0,),
            (0.0, 1.0),
            percent,
            percent=True,
        ),
        Panel(
            "Log-odds",
            "Of the chosen answer's mean token over the rejected one's. They should grow.",
            _both(run, "log_odds"),
            [(0.0, "")],
            (0.0,),
        ),
    ]
    return [panel for panel in panels if panel.curves]


def running_panels(run: RunRecord) -> list[Panel]:
    """Gradient norm, learning rate, entropy and throughput, as far as they were logged."""
    clip = run.setting("train", "max_grad_norm")
    clip = [(float(clip), "clipped here")] if isinstance(clip, (int, float)) and clip > 0 else []
    rate = _both(run, "learning_rate")
    for curve in rate:
        curve.noisy = False
    panels = [
        Panel(
            "Gradient norm",
            "Before clipping. Lone spikes are harmless, a steady climb is not.",
            _both(run, "grad_norm"),
            clip,
            (0.0,),
            (0.0, None),
        ),
        Panel(
            "Learning rate",
            "As scheduled, of the first parameter group.",
            rate,
            [],
            (0.0,),
            (0.0, None),
        ),
        Panel(
            "Entropy",
            "Nats per answer token. A collapse means the model grows certain of all it says.",
            _both(run, "entropy"),
            [],
            (),
            (0.0, None),
        ),
        Panel(
            "Token accuracy",
            "Share of answer tokens that are the model's first choice.",
            _both(run, "mean_token_accuracy"),
            [],
            (),
            (0.0, 1.0),
            percent,
            percent=True,
        ),
        Panel(
            "Pairs per second",
            "Over all ranks, between two log lines.",
            _both(run, "perf/examples_per_second"),
            [],
            (0.0,),
            (0.0, None),
        ),
        Panel(
            "Tokens per second",
            "Over all ranks, without padding.",
            _both(run, "perf/tokens_per_second"),
            [],
            (0.0,),
            (0.0, None),
        ),
        Panel(
            "Model flops utilisation",
            "Operations of forward and backward, over those of a product.",
            _both(run, "perf/mfu"),
            [],
            (0.0,),
            (0.0, None),
            percent,
            percent=True,
        ),
    ]
    return [panel for panel in panels if panel.curves]


def _both(run: RunRecord, name: str, tone: str = "plain") -> list[Curve]:
    """Training and evaluation of one metric, those that there are."""
    curves = []
    for evaluation, source in ((False, run.train), (True, run.eval)):
        if name in source:
            text = "eval" if evaluation else "train"
            curves.append(Curve(text, source[name], tone, evaluation, text))
    return curves


def _loss(run: RunRecord) -> Panel:
    known = run.starts_at_ln2
    names = " + ".join(run.loss_names) or "as configured"
    note = f"Objective: {names}. " + (
        "At the start it must be ln 2." if known else "It should fall."
    )
    rules = [(math.log(2), "ln 2")] if known else []
    return Panel("Loss", note, _both(run, "loss"), rules, tuple(value for value, _ in rules))


def _rewards(run: RunRecord) -> Panel:
    """Chosen and rejected in one panel; only one curve of each side has a label."""
    curves = []
    for tone in ("chosen", "rejected"):
        both = _both(run, f"rewards/{tone}", tone)
        for curve in both:
            curve.name = f"eval {tone}" if curve.evaluation else tone
            curve.label = tone if curve is both[-1] else ""
        curves += both
    beta = run.setting("loss", "beta")
    beta = f" (\N{GREEK SMALL LETTER BETA} = {beta})" if isinstance(beta, (int, float)) else ""
    note = (
        f"\N{GREEK SMALL LETTER BETA} times the log-ratio to the reference{beta}. They should part."
    )
    return Panel("Rewards, chosen and rejected", note, curves, [(0.0, "")], (0.0,))
