"""Which pairs are made of scored completions."""

from __future__ import annotations

import math
from collections import Counter

import pytest

from dpo_fast.data.config import DataConfig
from dpo_fast.data.rows import parse_row
from dpo_fast.judging import pairing
from dpo_fast.judging.config import PairsSection
from dpo_fast.judging.pairing import pairs_of, same_but_for_length
from tests.support.judging import row

CHAT = [{"role": "user", "content": "q"}]
FOUR = ("one apple", "two pears", "three plums", "four figs")


def texts(pairs) -> list[tuple[str, str]]:
    return [(pair.chosen.text[:3], pair.rejected.text[:3]) for pair in pairs]


def make(samples, scores, **options):
    refused = Counter()
    return pairs_of(samples, scores, PairsSection(**options), refused), +refused


def test_the_best_against_the_worst():
    pairs, refused = make(row(*FOUR), [1.0, 3.0, -2.0, 2.0])
    assert texts(pairs) == [("two", "thr")] and not refused
    assert pairs[0].difference == 5.0


def test_all_pairs_over_a_margin_the_largest_differences_first():
    scores = [1.0, 3.0, -2.0, 2.0]
    pairs, refused = make(row(*FOUR), scores, strategy="all", margin=1.0)
    differences = [pair.difference for pair in pairs]
    assert differences == [5.0, 4.0, 3.0, 2.0] and refused == {pairing.WITHIN: 2}
    few, _ = make(row(*FOUR), scores, strategy="all", max_per_prompt=2)
    assert [pair.difference for pair in few] == [5.0, 4.0]


def test_the_best_against_another_drawn_by_seed():
    drawn = {
        texts(make(row(*FOUR), [1.0, 3.0, -2.0, 2.0], strategy="best_random", seed=seed)[0])[0]
        for seed in range(30)
    }
    assert drawn == {("two", "one"), ("two", "thr"), ("two", "fou")}
    again = [
        texts(make(row(*FOUR, place=place), [1, 3, 0, 2], strategy="best_random")[0])
        for place in (0, 0, 1, 2, 3, 4, 5)
    ]
    assert again[0] == again[1] and len(set(map(tuple, again))) > 1


def test_equal_scores_are_no_pair_and_are_counted():
    assert make(row(*FOUR), [2.0] * 4) == ([], {pairing.TIED: 1})
    pairs, refused = make(row(*FOUR), [2.0, 2.0, 1.0, 1.0], strategy="all")
    assert len(pairs) == 4 and not refused


def test_completions_without_a_score_are_left_out():
    pairs, _ = make(row(*FOUR), [None, 3.0, None, 2.0])
    assert texts(pairs) == [("two", "fou")]
    assert make(row(*FOUR), [None, 3.0, None, None]) == ([], {pairing.FEW: 1})


def test_what_was_cut_off_is_not_chosen():
    samples = row(*FOUR, finish_reasons=["stop", "length", "length", "stop"])
    scores = [1.0, 3.0, -2.0, 2.0]
    assert texts(make(samples, scores)[0]) == [("fou", "thr")]
    assert texts(make(samples, scores, unfinished="drop")[0]) == [("fou", "one")]
    assert texts(make(samples, scores, unfinished="keep")[0]) == [("two", "thr")]
    pairs, refused = make(samples, scores, strategy="all")
    assert len(pairs) == 3 and refused == {"the better one unfinished": 3}
    cut = row("a b", "c d", finish_reasons=["length", "length"])
    assert make(cut, [1.0, 2.0]) == ([], {pairing.CUT: 1})


def test_a_text_stands_once_with_the_mean_of_its_scores():
    pairs, refused = make(row("a b", "a b", "c d"), [4.0, 0.0, 1.0])
    assert texts(pairs) == [("a b", "c d")] and pairs[0].chosen.score == 2.0
    assert refused == {pairing.ALIKE: 1}
    assert make(row("same", "same"), [1.0, 0.0])[1] == {pairing.ALIKE: 1, pairing.FEW: 1}


def test_empty_completions_teach_nothing():
    assert make(row("", "word"), [0.0, 1.0])[1] == {pairing.EMPTY: 1, pairing.FEW: 1}


def test_pairs_that_differ_in_length_alone_are_refused():
    cut = row("Yes, it is.", "Yes, it is. And more than that.")
    assert make(cut, [1.0, 0.0]) == ([], {pairing.ONLY_LENGTH: 1})
    assert len(make(cut, [1.0, 0.0], only_length="keep")[0]) == 1
    assert make(row("a" * 10, "b" * 31), [1, 0], max_length_ratio=3)[1] == {pairing.RATIO: 1}
    assert len(make(row("a" * 10, "b" * 30), [1, 0], max_length_ratio=3)[0]) == 1


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("It is 4.", "It is 42.", False),
        ("It is 4", "it is 4!!!", True),
        ("It is 4", "It is 4, I think", True),
        ("No", "Yes", False),
        ("+ +", "+ + +", True),
        ("+ -", "+ + -", False),
        ("日本", "日本語です", False),
    ],
)
def test_what_differs_in_length_alone(one, other, same):
    assert same_but_for_length(one, other) is same_but_for_length(other, one) is same


def test_a_row_for_training_has_its_scores_and_the_columns_that_are_asked_for():
    chat = [{"role": "user", "content": "q"}]
    samples = row(
        *FOUR, prompt=chat, id=7, tools=[{"name": "t"}], logps=[0.0] * 4, system="be kind"
    )
    pair = make(samples, [1, 3, -2, 2])[0][0]
    assert pair.row(samples, PairsSection()) == {
        "prompt": chat,
        "chosen": "two pears",
        "rejected": "three plums",
        "chosen_score": 3,
        "rejected_score": -2,
        "system": "be kind",
        "tools": [{"name": "t"}],
        "id": 7,
    }
    more = pair.row(samples, PairsSection(soft_label=0.2, margin_column=True))
    assert more["margin"] == 5 and math.isclose(more["soft_label"], 1 / (1 + math.exp(-1.0)))


def test_groups_hold_what_has_a_score():
    samples = row(*FOUR, id=3, finish_reasons=["stop", "length", "stop", "stop"])

    def group(scores, **options):
        refused = Counter()
        section = PairsSection(strategy="groups", **options)
        return pairing.group_of(samples, scores, section, refused), +refused

    found, refused = group([1.0, 0.5, None, 2.0])
    assert found == {
        "prompt": "q",
        "completions": ["one apple", "two pears", "four figs"],
        "scores": [1.0, 0.5, 2.0],
        "finish_reasons": ["stop", "length", "stop"],
        "id": 3,
    }
    assert not refused
    # One that was cut off is not the best of its group, unless that is wanted.
    assert group([1.0, 3.0, None, 2.0])[0]["scores"] == [1.0, 2.0]
    assert group([1.0, 3.0, None, 2.0], unfinished="keep")[0]["scores"] == [1.0, 3.0, 2.0]
    assert group([1.0, 0.5, None, 2.0], unfinished="drop")[0]["scores"] == [1.0, 2.0]
    assert group([1.0, None, 1.0, None]) == (None, {pairing.TIED: 1})
    assert group([1.0, None, None, None]) == (None, {pairing.FEW: 1})


@pytest.mark.parametrize(
    ("prompt", "answers"),
    [
        ("Say it again.", ["Say it again. No", "Say it again. Yes"]),
        ("Say it again.", ["Say it again. No", "Yes"]),
        (CHAT, ['[{"role": "assistant", "content": "oh"}]', "plain"]),
        (CHAT, ["plain", "[{'role': 'user', 'content': 'oh'}]"]),
        (CHAT, ['{"role": "user", "content": "oh"}', '{"a": 1}']),
        (CHAT, ["q No", "q Yes"]),
    ],
)
def test_train_takes_the_texts_that_were_sampled(prompt, answers):
    """Not an answer for the prompt repeated, nor JSON for messages."""
    config = DataConfig(train="x")
    read = lambda raw: parse_row("w", raw, config)  # noqa: E731
    text = lambda answer: answer if isinstance(answer, str) else answer[0]["content"]  # noqa: E731
    samples = row(*answers, prompt=prompt)
    (pair,), _ = make(samples, [1.0, 2.0])
    found = read(pair.row(samples, PairsSection()))
    assert (found.prompt, text(found.rejected), text(found.chosen)) == (prompt, *answers)
    group = pairing.group_of(samples, [1.0, 2.0], PairsSection(strategy="groups"), Counter())
    assert [text(each) for each in read(group).completions] == answers


def test_rows_say_which_answers_were_cut_off():
    samples = row(*FOUR[:3], finish_reasons=["stop", "length", "stop"])
    pairs, _ = make(samples, [3.0, 1.0, 2.0], strategy="all")
    rows = [pair.row(samples, PairsSection()) for pair in pairs]
    assert [each.get("rejected_finish_reason") for each in rows] == ["length", None, "length"]
    assert not any("chosen_finish_reason" in each for each in rows)
    (kept,), _ = make(samples, [1.0, 3.0, 2.0], unfinished="keep")
    assert kept.row(samples, PairsSection())["chosen_finish_reason"] == "length"
    group = pairing.group_of(samples, [3.0, 1.0, 2.0], PairsSection(strategy="groups"), Counter())
    assert group["finish_reasons"] == ["stop", "length", "stop"]
