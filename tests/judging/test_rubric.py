"""What a chat model is asked, and how its answers are read."""

from __future__ import annotations

import pytest

from dpo_fast.errors import UserError
from dpo_fast.judging.rubric import Rubric, after_thinking, conversation, score_of, winner_of
from tests.support.judging import row

CHAT = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "who?"},
]


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("It is good. Rating: [[7]]", 7),
        ("[[3]] at first, but then [[ 8.5 ]]", 8.5),
        ("Rating: [[7/10]]", 7),
        ("[[-2]]", -2),
        (" 6 ", 6),
        ('{"score": 4}', 4),
        ('<think>[[A]]</think> ```json\n{"why": "x", "score": 9}\n```', 9),
    ],
)
def test_a_score_is_the_last_mark(answer, score):
    assert score_of(answer) == score


@pytest.mark.parametrize(
    "answer",
    ["", "I will not.", "7 out of 10 people", '{"score": true}', '{"score": "x"}', "{" * 9999],
)
def test_an_answer_without_a_score_is_none(answer):
    with pytest.raises(ValueError, match="holds no"):
        score_of(answer)


@pytest.mark.parametrize(
    ("answer", "winner"),
    [("so [[A]]", "A"), ("[[A]] or rather [[b]]", "B"), ("[[tie]]", "C"), ("B.", "B")]
    + [('{"winner": "tie"}', "C"), ("C", "C")],
)
def test_a_winner_is_the_last_mark(answer, winner):
    assert winner_of(answer) == winner


@pytest.mark.parametrize(
    "answer", ["", "Both are fine", "[[D]]", "A is better", '{"winner": null}']
)
def test_an_answer_without_a_winner_is_none(answer):
    with pytest.raises(ValueError, match="holds no"):
        winner_of(answer)


def test_a_conversation_is_told_by_turns():
    assert conversation(row("a", prompt="only this")) == "only this"
    assert conversation(row("a", prompt=CHAT)) == "User: hi\n\nAssistant: hello\n\nUser: who?"
    assert conversation(row("a", prompt="q", system="be kind")) == "System: be kind\n\nUser: q"


def test_braces_in_texts_stay():
    rubric = Rubric("Q: {prompt} A: {completion} { other }", "pointwise")
    filled = rubric.filled(row("x", prompt="{completion}"), completion="{prompt} {0}")
    assert filled == "Q: {completion} A: {prompt} {0} { other }"


def test_a_rubric_of_a_file(tmp_path):
    (tmp_path / "rubric.txt").write_text("{first} {second}", encoding="utf-8")
    rubric = Rubric(f"file:{tmp_path}/rubric.txt", "pairwise")
    assert rubric.filled(row("a"), first="1", second="2") == "1 2"
    with pytest.raises(UserError, match=r"judge\.rubric has no \{completion\}"):
        Rubric(f"file:{tmp_path}/rubric.txt", "pointwise")
    with pytest.raises(UserError, match=r"judge\.rubric=file:.*none cannot be read: No such file"):
        Rubric(f"file:{tmp_path}/none", "pairwise")


def test_what_a_judge_thought_of_is_no_verdict():
    assert after_thinking("<think>[[3]]</think>\n[[7]]") == "\n[[7]]"
    assert after_thinking("[[3]]</think> 7") == " 7"  # where the template has opened the thinking
    assert after_thinking("<think>[[3]] or [[4") == ""


def test_ratings_off_the_scale_of_the_default_rubric():
    ours, own = Rubric(None, "pointwise"), Rubric("{completion}", "pointwise")
    assert ours.score_of("[[10]]") == 10 and own.score_of("[[2026]]") == 2026
    with pytest.raises(ValueError, match="2026 is no rating from 1 to 10"):
        ours.score_of("[[2026]]")


@pytest.mark.parametrize(
    "compare, text",
    [("pointwise", "{question} {completion}"), ("pairwise", "{first} {second} {completion}")],
)
def test_a_place_that_nothing_fills_is_told_with_those_there_are(compare, text):
    with pytest.raises(UserError, match=r"judge.rubric has \{(question|completion)\}.*\{prompt\}"):
        Rubric(text, compare)


def test_objects_of_json_in_a_rubric_are_no_places():
    text = 'Answer {"score": 7} or {{score}} or {1} for {completion}'
    assert Rubric(text, "pointwise").text == text
