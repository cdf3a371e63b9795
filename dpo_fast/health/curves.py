"""Rules on curves. Each returns a sentence, "" if all is in order, or None if too little was logged.

A sentence says what was seen, in numbers and over which steps, what it means, and what people do.
"""

from __future__ import annotations

import math
import statistics

from dpo_fast.health.courses import (
    FEW_LINES,
    FEW_STEPS,
    RISE,
    Course,
    course,
    evaluated,
    mean,
    noise,
    settled,
    trained,
)
from dpo_fast.health.history import History, Points
from dpo_fast.numbers import number, percent

NOISY = 0.15  # of the loss, above which nobody can tell whether it falls
PINNED = 1e-3  # from 0 or 1
LEAST_FALL = 0.5  # nats of the chosen log-probability
LEAST_FALL_SHARE = 0.02  # of its size; a long answer moves by more
LEAST_GROWTH = 0.02  # of the margin
EARLY = 0.25  # of the planned steps, before which a loss that does not fall may be warming up
SATURATED = 10.0  # margin at which sigmoid(-margin) = 4.5e-5: such a pair no longer trains
COLLAPSED = 1 / 3  # of the first entropy
SPIKE = 10.0  # times the median of the lines before it
BEFORE, FEW_BEFORE = 20, 5  # lines of that median, at most and at least
LONG = 0.75  # share of the longer answers among those that are preferred
DRIFT = 0.2  # by which that share exceeds the labels'


def loss_flat(run: History) -> str | None:
    """Neither training nor evaluation falls, once there are steps enough."""
    courses = _losses(run)
    if courses is None:
        return None
    if any(each.falls for each in courses) or courses[-1].rises:
        return ""
    last = courses[-1]
    if run.last_step < FEW_STEPS or run.share < EARLY or 2 * last.noise > NOISY * abs(last.first):
        return None
    noisy = f", where noise makes {number(2 * last.noise)}" if last.noise else ""
    return (
        f"The loss does not fall ({last.ends}{noisy}), which means that the model is not learning the "
        "preference; people usually raise train.learning_rate, train longer, or read a few pairs to see "
        "that chosen and rejected are told apart."
    )


def loss_rising(run: History) -> str | None:
    """Training or evaluation rises, and neither falls."""
    courses = _losses(run)
    if courses is None:
        return None
    if any(each.falls for each in courses) or not courses[-1].rises:
        return ""
    return (
        f"The loss rises ({courses[-1].ends}), which means that the model moves away from the preference; "
        "people usually lower train.learning_rate, or look whether data.columns swaps the answers."
    )


def _losses(run: History) -> list[Course] | None:
    """Of training and evaluation, as far as they are there; none against a reference that follows."""
    if not settled(run) or run.follows:
        return None
    courses = trained(run.train.get("loss", [])), evaluated(run.eval.get("loss", []))
    return [each for each in courses if each is not None] or None


def overfitting(run: History) -> str | None:
    """The evaluation loss does not fall as the training loss does, or only at first."""
    points = run.eval.get("loss", [])
    training, evaluation = trained(run.train.get("loss", [])), evaluated(points)
    if evaluation is None or not settled(run) or run.follows:
        return None
    step, least = min(points, key=lambda point: point[1])
    if step == points[0][0]:
        told = evaluation.rises or run.last_step >= FEW_STEPS
        return _by_heart(training, evaluation) if told and training and training.falls else ""
    if evaluation.last - least <= max(RISE * abs(least), 2 * evaluation.noise):
        return ""
    return (
        f"The evaluation loss was least at step {step:.0f} ({number(least)}) and came to "
        f"{number(evaluation.last)} at step {evaluation.end:.0f}, which means that training went on into "
        "overfitting; people usually take the checkpoint nearest the first of these steps, train fewer "
        "epochs, or lower train.learning_rate."
    )


def _by_heart(training: Course, evaluation: Course) -> str:
    verb = "rises" if evaluation.rises else "does not fall"
    return (
        f"The evaluation loss {verb} ({evaluation.ends}) while the training loss falls "
        f"({training.ends}), which means that the model learns its training pairs by heart; people usually "
        "lower train.learning_rate, train fewer epochs, raise loss.beta, or add pairs."
    )


def always_rejected(run: History) -> str | None:
    """The accuracy is 0 at the end: two of three evaluations, half of the lines of training."""
    return _pinned(
        run,
        lambda value: value <= PINNED,
        "the model learns the opposite of what is measured; people usually look for chosen and rejected "
        "swapped in data.columns, or for a train.learning_rate far too high.",
    )


def always_chosen(run: History) -> str | None:
    """The accuracy is 1 at the end, as in `always_rejected`."""
    return _pinned(
        run,
        lambda value: value >= 1 - PINNED,
        "the pairs are easy to tell apart, perhaps by length or form alone; people usually stop earlier, "
        "raise loss.beta, or choose pairs that are closer to each other.",
    )


def _pinned(run: History, at_the_end, meaning: str) -> str | None:
    evaluations = run.eval.get("rewards/accuracies", [])
    points = run.train.get("rewards/accuracies", [])
    tails = [
        evaluations[-2:] if len(evaluations) >= 3 else [],
        points[-(len(points) // 2) :] if len(points) >= FEW_LINES else [],
    ]
    if not any(tails) or not settled(run):
        return None
    curves = (evaluations, points)
    for tail, curve, where in zip(tails, curves, ("evaluation", "training")):
        # Without a reference the lengths of answers may decide from the beginning.
        learned = run.compares or not all(at_the_end(value) for _, value in curve)
        if tail and learned and all(at_the_end(value) for _, value in tail):
            steps = f"steps {tail[0][0]:,.0f} to {tail[-1][0]:,.0f}"
            return (
                f"The {where} accuracy stays at {percent(tail[-1][1])} ({steps}), which means that "
                + meaning
            )
    return ""


def chosen_falling(run: History) -> str | None:
    """The chosen log-prob falls while the margin grows: likelihood displacement.

    Pal et al. 2024 (DPO-Positive, arXiv:2402.13228) and Razin et al. 2024 (arXiv:2410.08847) describe it
    and what helps: a term that keeps the chosen answer likely, and pairs that differ by more.
    """
    ends, margins = course(run, "logps/chosen"), course(run, "rewards/margins")
    if ends is None or margins is None:
        return None
    least = max(LEAST_FALL, LEAST_FALL_SHARE * abs(ends.first))
    # Log-probs of training batches differ from batch to batch; rewards against a reference do less so.
    in_training = len(run.eval.get("logps/chosen", ())) < 2
    if in_training and not run.compares:
        least = max(least, 2 * ends.noise)
    falls = ends.first - ends.last > least
    if in_training:
        rewards = course(run, "rewards/chosen")
        falls = falls and (rewards is None or rewards.last < rewards.first)
    if not (falls and margins.last - margins.first > LEAST_GROWTH):
        return ""
    return (
        f"The chosen log-probability falls ({ends.ends}) while the margin grows "
        f"({number(margins.first)} to {number(margins.last)}), which means that the model mostly learns to "
        "avoid the rejected answers and may drift from the chosen ones (Razin et al. 2024); people usually "
        "add the sft loss to loss.type, raise loss.beta, or lower train.learning_rate."
    )


def margin_exploding(run: History) -> str | None:
    """The margin grows where the sigmoid is flat already."""
    points = run.train.get("rewards/margins", [])
    margins = trained(points) if settled(run) else None
    if margins is None:
        return None
    if min(margins.last, margins.last - points[0][1]) <= SATURATED:
        return ""
    margins = margins._replace(first=points[0][1])
    return (
        f"The margin explodes ({margins.ends}): sigmoid({number(-margins.last)}) = "
        f"{number(1 / (1 + math.exp(min(margins.last, 700))))} is the weight of such a pair, which means "
        "that the policy runs from its reference without anything left to learn; people usually lower "
        "train.learning_rate, raise loss.beta, stop earlier, or take loss.type=ipo, which bounds it."
    )


def entropy_collapse(run: History) -> str | None:
    """The entropy over scored tokens falls below a third of what it was.

    Not so where chosen answers become likelier: a model that learns to write them becomes sure as well.
    """
    if not settled(run):
        return None
    found = evaluated(run.eval.get("entropy", []))
    points = run.train.get("entropy", [])
    if found is None and points:
        found = trained(points)
        found = found and found._replace(first=mean(points[:3]))
    if found is None:
        return None
    chosen = course(run, "logps/chosen")
    if found.last >= COLLAPSED * found.first or (chosen and chosen.last > chosen.first):
        return ""
    return (
        f"The entropy collapses ({found.ends}) while the chosen answers become no likelier, which means "
        "that the model is sure of single tokens and its answers lose variety; people usually lower "
        "train.learning_rate, raise loss.beta, or stop earlier."
    )


def gradient_spikes(run: History) -> str | None:
    """A gradient norm that is clipped and far above the lines before it."""
    points = run.train.get("grad_norm", [])
    if len(points) <= FEW_BEFORE:
        return None
    clip, spikes = run.setting("train", "max_grad_norm", default=1.0), []
    for place in range(FEW_BEFORE, len(points)):
        step, value = points[place]
        if value <= clip:
            continue
        usual = statistics.median(value for _, value in points[max(0, place - BEFORE) : place])
        if value > SPIKE * usual:
            spikes.append((value / max(usual, 1e-30), value, step, usual))
    if not spikes:
        return ""
    times, value, step, usual = max(spikes)
    many = f"{len(spikes)} lines" if len(spikes) > 1 else "1 line"
    return (
        f"The gradient norm spikes: {number(value)} at step {step:,.0f}, {times:,.0f} times the median "
        f"{number(usual)} of the lines before; {many} of {len(points)} did so, which means that single "
        "batches throw the model off; people usually look at the rows of that step, lower "
        "train.max_grad_norm or train.learning_rate, or lengthen train.warmup_ratio."
    )


def length_drift(run: History) -> str | None:
    """The policy prefers an answer by its length more than the labels do.

    Park et al. 2024 (arXiv:2403.19159) show that DPO takes up and exaggerates the length of what is
    preferred.
    """
    points: Points = run.train.get("rewards/longer", [])
    labels = run.fact("data/chosen_longer")
    if labels is None or len(points) < 4 or not settled(run):
        return None
    tail = points[-(len(points) // 4) :]
    share = mean(tail)
    side, others = max((share, labels), (1 - share, 1 - labels))
    scatter = 2 * noise(points) / math.sqrt(len(tail))
    if side <= LONG or side - max(others, 0.5) <= DRIFT + scatter:
        return ""
    first = mean(points[: len(tail)])
    if not run.compares and side - max(first if share > 0.5 else 1 - first, 0.5) <= DRIFT + scatter:
        return ""  # a sum of log-probs is greater for a shorter answer before anything is learned
    what = "longer" if share > 0.5 else "shorter"
    return (
        f"The {what} answer of a pair has the greater reward in {percent(side)} of pairs (steps "
        f"{tail[0][0]:,.0f} to {tail[-1][0]:,.0f}), where the labels prefer it in {percent(others)}, which "
        "means that the model learns length in place of the preference (Park et al. 2024); people usually "
        "set loss.ld_alpha, take a loss of averages such as simpo, or balance the lengths of their pairs."
    )
