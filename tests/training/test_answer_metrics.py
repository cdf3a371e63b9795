"""Win rates with their interval, and how much texts repeat."""

import math

import pytest

from dpo_fast.training.answer_metrics import distinct, mean, win_rate


def test_a_win_rate_counts_ties_as_half_and_leaves_out_what_has_no_score():
    found = win_rate([3, 1, 2, None, 5], [1, 3, 2, 1, None])
    assert (found.rate, found.count) == (0.5, 3)
    assert win_rate([None], [1.0]) is None


@pytest.mark.parametrize(
    ("wins", "count", "low", "high"),
    [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (50, 100, 0.4038, 0.5962)],
)
def test_the_interval_is_wilsons(wins, count, low, high):
    """Values of Wilson's formula, as in statsmodels' proportion_confint(method="wilson")."""
    found = win_rate([1.0] * wins + [0.0] * (count - wins), [0.5] * count)
    assert found.rate == wins / count
    assert (found.low, found.high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


def test_its_bounds_solve_the_equation_that_defines_them():
    """(p - bound)^2 = z^2 bound (1 - bound) / n."""
    found = win_rate([1.0] * 13 + [0.0] * 7, [0.5] * 20)
    for bound in (found.low, found.high):
        expected = 1.959964 * math.sqrt(bound * (1 - bound) / 20)
        assert abs(found.rate - bound) == pytest.approx(expected, rel=1e-6)


def test_distinct_n_grams_are_counted_over_all_texts():
    texts = ["a b a b", "a b", ""]
    assert distinct(texts, 1) == 2 / 6
    assert distinct(texts, 2) == 2 / 4  # a b, b a, a b; a b
    assert distinct(["a", "b"], 2) is None


def test_a_mean_leaves_out_what_is_not_there():
    assert mean([1.0, None, 3.0]) == 2.0 and mean([None]) is None
