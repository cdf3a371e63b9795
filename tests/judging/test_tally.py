"""Counts of verdicts and pairs, and whether length decides."""

from __future__ import annotations

import random

import numpy as np
import pytest

from dpo_fast.cli.judge import notes, show
from dpo_fast.judging.config import PairsSection
from dpo_fast.judging.pairing import pairs_of
from dpo_fast.judging.tally import DISTINCT, Moments, Tally
from tests.support.judging import row


def tallied(*judged) -> dict:
    """judged: completions with their scores."""
    tally = Tally()
    for place, (texts, scores) in enumerate(judged):
        each = row(*texts, place=place)
        words = ["refused" if score is None else "scored" for score in scores]
        tally.row(each, scores, words, ["why" if score is None else "" for score in scores])
        tally.pairs_of_row(pairs_of(each, scores, PairsSection(), tally.refused))
    return tally.report()


def test_a_correlation_is_that_of_numpy_and_none_without_a_spread():
    draw = random.Random(0)
    pairs = [(draw.gauss(100, 20), draw.gauss(3, 1)) for _ in range(50)]
    moments = Moments()
    for pair in pairs:
        moments.add(*pair)
    assert moments.correlation == pytest.approx(np.corrcoef(np.array(pairs).T)[0, 1])
    constant = Moments()
    for x in range(9):
        constant.add(x, 0.1)
    assert constant.correlation is None and Moments().correlation is None


def test_length_within_prompts_is_told_from_length_between_them():
    """Later prompts get longer answers and higher scores, whichever of the two is better."""
    judged = [
        (["yes " * 10 * place, "no " * 10 * place + "never"], [place * 9 + 1, place * 9])
        for place in range(1, 9)
    ]
    report = tallied(*judged)
    assert report["score_length_correlation"] > 0.9
    assert report["pairs"] == 8 and report["chosen_longer"] == 1
    assert report["score_length_correlation_within_prompts"] > 0.5
    assert "the judge prefers longer answers" in " ".join(notes(report))
    shorter = [(texts, scores[::-1]) for texts, scores in judged]
    assert tallied(*shorter)["score_length_correlation_within_prompts"] < -0.5


def test_counts():
    report = tallied(
        (("a b", "c d e"), (1.0, 2.0)), (("x", "y"), (3.0, None)), (("p", "q"), (5.0, 5.0))
    )
    assert report["prompts"] == 3 and report["completions"] == 6 and report["pairs"] == 1
    assert report["verdicts"] == {"scored": 5, "refused": 1, "unparsable": 0, "failed": 0}
    assert report["reasons"] == {"refused": ["samples.jsonl:2: why"]}
    assert report["refused"] == {"fewer than two scores": 1, "all scores equal": 1}
    assert report["chosen_longer"] == 1 and report["mean_difference"] == 1.0
    assert report["prompts_tied"] == 1 and report["mean_score"] == 3.2
    assert notes(report)[0] == "1 completions refused, the first of them samples.jsonl:2: why"


def test_many_values_are_not_kept():
    tally = Tally()
    for place in range(DISTINCT + 9):
        tally.row(row("a", place=place), [float(place)], ["scored"], [""])
    assert tally.report()["distinct_scores"] == "1000 or more" and tally.only_value is None


def test_a_judge_that_goes_by_the_place_is_told():
    report = tallied((("a b", "c d"), (1.0, 2.0)))
    counts = {"comparisons": 20, "won by the first": 18, "won by the second": 2}
    assert "the judge goes by the place: the first answer won 18 of 20 comparisons" in notes(
        report | {"comparisons": counts}
    )
    fair = counts | {"won by the first": 9, "won by the second": 11}
    assert not notes(report | {"comparisons": fair})


def test_the_table_shows_every_count(capsys):
    from rich.console import Console

    report = tallied((("a b", "c d"), (1.0, 2.0)), (("x", "y"), (3.0, None)))
    show(report, Console(width=100))
    shown = capsys.readouterr().out
    for word in (
        "prompts",
        "verdicts: refused",
        "refused: fewer than two scores",
        "mean difference",
    ):
        assert word in shown
