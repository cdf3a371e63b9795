"""Rules on what was measured of the start and of the data. As in `curves`, each returns a sentence."""

from __future__ import annotations

import math

from dpo_fast.health.history import History
from dpo_fast.numbers import number, percent

START_TOLERANCE = 1e-3
OTHER_MODEL = 0.5  # nats a token between policy and reference: 1.6 times the perplexity
FEW_ROWS = 50  # below which shares of the data say nothing
REPEATED = 0.05  # of the rows
ANSWERS_CUT, PROMPTS_CUT = 0.05, 0.2
LEAKED = 0.01  # of the evaluation
ALIKE = 0.2  # of the pairs
BY_LENGTH = 0.7  # accuracy of a rule that looks at lengths alone
CONTRADICTED = 0.01  # of the pairs


def not_finite(run: History) -> str:
    if not run.not_finite:
        return ""
    name, step = min(run.not_finite.items(), key=lambda item: item[1])
    return (
        f"{name} was NaN or infinite at step {step:.0f}, which means that the numbers overflowed; "
        "people usually lower train.learning_rate, lengthen train.warmup_ratio, or look at the data "
        "of that step."
    )


def start_loss(run: History) -> str | None:
    """The loss before the first update is ln 2, where that follows from the configuration."""
    evaluation, training = (curves.get("loss", []) for curves in (run.eval, run.train))
    # Weights and margins of pairs give the sigmoid loss another start, which the run has reckoned out.
    expected = run.fact("start/expected")
    if expected is not None and abs(expected - math.log(2)) > START_TOLERANCE:
        return None
    if run.starts_at_ln2 and evaluation and evaluation[0][0] == 0:
        where, loss = "evaluation loss at step 0", evaluation[0][1]
    elif run.starts_at_ln2 and expected is not None and training and training[0][0] == 1:
        where, loss = "training loss at step 1, before the first update,", training[0][1]
    else:
        return None
    # What rounding moves one reward by: the mean over any number of pairs moves by less.
    rounding = max((value for _, value in run.train.get("start/rewards", [])), default=0.0)
    if abs(loss - math.log(2)) <= max(START_TOLERANCE, rounding):
        return ""
    return (
        f"The {where} is {loss:.4f} and not ln 2 = 0.6931, which means that the "
        "reference is not the model training starts from; people usually look for a reference.cache_dir "
        "of another model, for dropout, and at model.dtype."
    )


def reference_mismatch(run: History) -> str | None:
    """The reference is far from the policy before it has moved."""
    beta, tokens = run.setting("loss", "beta", default=0.1), run.fact("data/answer_tokens")
    first = [run.eval, run.train][not run.eval.get("rewards/chosen")]
    sides = [first.get(f"rewards/{side}", [])[:1] for side in ("chosen", "rejected")]
    if not (all(sides) and tokens and beta) or sides[0][0][0] > 1:
        return None
    if run.provider is None or not run.compares:
        return None
    apart = sum(abs(points[0][1]) for points in sides) / 2 / beta / tokens
    if apart <= OTHER_MODEL:
        return ""
    step = f"{sides[0][0][0]:.0f}"
    return (
        f"Policy and reference differ by {number(apart)} nats a token at step {step}, before the policy "
        "has moved, which means that the reference is of another model, template or tokenizer, or that its "
        "columns hold averages where sums are meant; people usually look at reference.path, "
        "reference.cache_dir and the reference columns."
    )


def length_shortcut(run: History) -> str | None:
    """Length alone predicts the label. Singhal et al. 2023 (arXiv:2310.03716): rewards often do so."""
    longer, rows = run.fact("data/chosen_longer"), run.fact("data/unequal")
    if longer is None or rows is None or rows < FEW_ROWS:
        return None
    right, what = max((longer, "longer"), (1 - longer, "shorter"))
    if right - 1 / math.sqrt(rows) <= BY_LENGTH:  # two standard errors
        return ""
    return (
        f"The {what} answer is the chosen one in {percent(right)} of {rows:,.0f} pairs of unequal length, "
        "so that a rule that looks at length alone has this accuracy, which means that the model can "
        "learn length in place of the preference (Singhal et al. 2023); people usually balance the "
        "lengths of their pairs, set loss.ld_alpha, or take a loss of averages such as simpo."
    )


def duplicates(run: History) -> str | None:
    return _share(
        run,
        "data/duplicates",
        REPEATED,
        "of {rows} examples repeat another one token by token, which means that they count several times; "
        "people usually remove them, or train fewer epochs.",
    )


def contradictory(run: History) -> str | None:
    return _share(
        run,
        "data/contradictory",
        CONTRADICTED,
        "of {rows} pairs stand in the data the other way round too, which means that they teach nothing "
        "and set a floor to the loss; people usually remove both, or settle which one is right.",
    )


def truncated(run: History) -> str | None:
    answers = _share(
        run,
        "data/answers_cut",
        ANSWERS_CUT,
        "of the answers of {rows} examples were cut to fit data.max_length and have lost their end, which "
        "means that the model learns answers that break off; people usually raise data.max_length or set "
        "data.truncation to leave such rows out.",
    )
    return answers or _share(
        run,
        "data/prompts_cut",
        PROMPTS_CUT,
        "of {rows} prompts were cut to fit data.max_length, which means that answers are judged without "
        "all of their question; people usually raise data.max_length, or leave such rows out with "
        "data.truncation.",
    )


def nearly_equal(run: History) -> str | None:
    return _share(
        run,
        "data/nearly_equal",
        ALIKE,
        "of {rows} pairs have answers that share nine tenths of their tokens at the beginning and the end, "
        "which means that what both share loses probability too (Pal et al. 2024); people usually take "
        "loss.type=dpop or add the sft loss, or choose pairs that differ by more.",
    )


def eval_in_train(run: History) -> str | None:
    return _share(
        run,
        "data/leaked",
        LEAKED,
        "of the evaluation examples stand among the training examples too, which means that evaluation "
        "shows memory; people usually remove them from one of the two.",
    )


def _share(run: History, name: str, most: float, rest: str) -> str | None:
    """A share of the data that is too large. rest: what follows it, with {rows}."""
    share, rows = run.fact(name), run.fact("data/rows")
    if share is None or rows is None or rows < FEW_ROWS:
        return None
    return f"{percent(share)} {rest.format(rows=f'{rows:,.0f}')}" if share > most else ""
