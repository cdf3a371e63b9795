"""Thinking marks of all families, found and put back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_fast.data.thinking import (
    MARKS,
    continue_thought,
    find_opening,
    find_thought,
    without_empty_thought,
    write_thought,
)

WORDS = st.text(alphabet="ab \n", max_size=6)


def content(text, **fields):
    return {"role": "assistant", "content": text, **fields}


@pytest.mark.parametrize("begun, ended", MARKS)
@given(inside=WORDS, gap=st.sampled_from(["", "\n", "\n\n", " "]))
def test_a_thought_is_found_and_nothing_is_lost(begun, ended, inside, gap):
    for opening in (begun, ""):
        written = f"{opening}{inside}{ended}{gap}so"
        thought = find_thought(content(written))
        assert (thought.open, thought.close, thought.gap, thought.rest) == (begun, ended, gap, "so")
        assert thought.inside.strip() == inside.strip()
        assert thought.inside + ended + gap + "so" in written


def test_a_field_comes_before_the_content():
    thought = find_thought(content("so", reasoning_content="hmm"))
    assert (thought.inside.strip(), thought.rest, thought.key) == ("hmm", "so", "reasoning_content")
    assert find_thought(content("so", reasoning_content=" ")) is None
    assert find_thought(content("so <think>")) is None


@pytest.mark.parametrize("begun, ended", MARKS)
@pytest.mark.parametrize("gap", ["", "\n", "\n\n"])
def test_the_end_of_a_generation_prompt(begun, ended, gap):
    opening = find_opening(f"<A>{begun}{gap}")
    assert (opening.base, opening.open, opening.closed) == ("<A>", begun, False)
    for block in (f"{begun}\n{ended}", f"{begun}{ended}", ended):
        opening = find_opening(f"<A>{block}{gap}")
        assert (opening.base, opening.open, opening.closed) == ("<A>", begun, True)
    assert find_opening(f"<A>{begun}hmm{gap}") is None
    assert find_opening("<A>") is None


@pytest.mark.parametrize(
    "rest, expected",
    [
        ("<think>\nhmm</think>so", "<A><think>\nhmm</think>so"),
        ("<think></think>so", "<A><think>\n</think>so"),
        ("</think>so", "<A><think>\n</think>so"),
        ("hmm</think>so", "<A><think>\nhmm</think>so"),
        ("so", None),
    ],
)
def test_a_finished_turn_goes_on_from_an_opened_thought(rest, expected):
    prompt = "<A><think>\n"
    assert continue_thought(prompt, rest, find_opening(prompt)) == expected


def test_empty_thinking_is_taken_off_at_the_beginning_alone():
    opening = find_opening("<A><think>\n\n</think>\n\n")
    for empty in ("<think>\n\n</think>\n\n", "<think></think>", "</think>", ""):
        assert without_empty_thought(f"{empty}so</think>", opening) == "so</think>"
    assert without_empty_thought("<think>hmm</think>so", opening) == "<think>hmm</think>so"


@pytest.mark.parametrize(
    "prompt, rest, message, expected",
    [
        ("<A><think>\n", "so", content("<think>\nhmm\n</think>\n\nso"), "hmm\n</think>\n\nso"),
        ("<A><think>\n", "so", content("so", thinking="hmm"), "hmm\n</think>\n\nso"),
        ("<A><think>", "so", content("so", thinking="hmm"), "hmm</think>so"),
        ("<A><think>", "</think>so", content("<think>hmm</think>so"), "hmm</think>so"),
        ("<A>", "so", content("<think>hmm</think> so"), "<think>hmm</think> so"),
        ("<A>", "<think></think>so", content("so", thinking="hmm"), "<think>hmm</think>so"),
        ("<A>", "<think></think>so", content("a\n</think>\nso"), "<think>a\n</think>\nso"),
        ("<A>", "so", content("so", thinking="hmm"), None),
        ("<A>", " to=user so", content("<think>hmm</think>so"), None),
    ],
)
def test_thinking_that_a_template_leaves_out_is_written_back(prompt, rest, message, expected):
    text = write_thought(prompt, rest, find_thought(message), find_opening(prompt))
    assert text == (None if expected is None else prompt + expected)


@pytest.mark.parametrize("opening, close", MARKS)
def test_every_family_is_known_by_its_marks(opening, close):
    """What saves most contents and prompts the search must pass over none."""
    assert find_thought(content(f"{opening}hmm{close}so")).inside == "hmm"
    for gap in ("", "\n", "\n\n", " "):
        assert find_opening(f"<A>{opening}{gap}").open == opening
        found = find_opening(f"<A>{opening}\n{close}{gap}")
        assert (found.open, found.closed, found.gap) == (opening, True, gap)
    assert find_opening(f"<A>{opening}x") is None and find_thought(content("a > b]")) is None
