"""The sections `judge` and `pairs`: every judge has its own options."""

from __future__ import annotations

import pytest
from pydantic import BaseModel

from dpo_fast.errors import UserError
from dpo_fast.judging.config import EVERYWHERE, USES, JudgeSection, PairsSection
from dpo_fast.judging.table import JUDGES
from dpo_fast.training.config import build


class File(BaseModel):
    judge: JudgeSection | None = None
    pairs: PairsSection = PairsSection()


def refusal(judge: dict | None = None, **pairs) -> str:
    tree = {"judge": judge} if judge else {"pairs": pairs}
    with pytest.raises(UserError) as error:
        build(File, tree, "file")
    return str(error.value)


def test_every_option_belongs_to_a_judge_and_every_judge_is_in_the_table():
    used = {name for names in USES.values() for name in names}
    assert used | set(EVERYWHERE) == set(JudgeSection.model_fields)
    assert set(USES) == set(JUDGES)


def test_an_option_of_another_judge_is_refused_by_name():
    message = refusal({"type": "rule", "function": "a:b", "rubric": "x"})
    assert "judge.rubric='x' is an option of judge.type=openai" in message
    assert "judge.type=rule; remove it" in message
    # An option at its default is an option that was given, too.
    assert "judge.beta=0.1" in refusal({"type": "rule", "function": "a:b", "beta": 0.1})
    # `judge.type=command judge.function=null` of a file with a rule.
    JudgeSection(type="command", command="score", function=None)


@pytest.mark.parametrize(
    ("judge", "said"),
    [
        ({"type": "rule"}, "judge.type=rule needs judge.function"),
        (
            {"type": "rule", "function": ["a:b", "c:d"], "weights": [1]},
            "judge.weights=[1.0]: 2 functions need as many weights",
        ),
        (
            {"type": "rule", "function": "a:b", "weights": [1]},
            "judge.weights=[1.0] is for several functions; remove it",
        ),
        ({"type": "rule", "function": ["a:b", "c"]}, "judge.function=c: expected module:function"),
        ({"type": "rule", "function": "score"}, "expected module:function or path.py:function"),
        ({"type": "command"}, "judge.type=command needs judge.command"),
        ({"type": "command", "command": "'a"}, "judge.command='a: No closing quotation"),
        ({"type": "openai", "url": "http://a"}, "needs judge.model"),
        ({"type": "openai", "url": "a:80", "model": "m"}, "judge.url=a:80: expected the address"),
        ({"type": "reward_model"}, "needs judge.path"),
        ({"type": "implicit"}, "needs judge.reference"),
        (
            {"type": "openai", "url": "http://u", "model": "m", "both_orders": True},
            "judge.both_orders is used with judge.compare=pairwise alone",
        ),
        ({"type": "ruel"}, "judge.type='ruel'"),
    ],
)
def test_what_a_judge_needs(judge, said):
    assert said in refusal(judge)


def test_options_of_pairs_that_nothing_uses_are_refused():
    assert "pairs.seed=1 is used by pairs.strategy=best_random alone" in refusal(seed=1)
    assert "set pairs.strategy=all" in refusal(max_per_prompt=2)
    said = refusal(strategy="groups", margin=1)
    assert "pairs.margin=1.0 is of pairs, and pairs.strategy=groups makes none" in said
    assert "pairs.margin=-1" in refusal(margin=-1)
    assert "pairs.max_length_ratio=0.5" in refusal(max_length_ratio=0.5)


def test_a_command_is_words_or_a_line():
    assert JudgeSection(type="command", command="a -b 'c d'").arguments == ["a", "-b", "c d"]
    assert JudgeSection(type="command", command=["a b", "c"]).arguments == ["a b", "c"]
