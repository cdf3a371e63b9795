"""The forms in which templates take messages, and what counts as left out."""

import pytest

from dpo_fast.data.dialects import (
    AS_IS,
    WRITTEN,
    Dialect,
    dialects,
    left_out_of_answer,
    left_out_of_prompt,
)
from tests.support.templates import CALLS, message, user

THINKS = message("assistant", "<think>hmm</think>so")


def forms(answer, source, prompt=()):
    return list(dialects([*prompt, user()], [[answer]], source, parts=False))


def test_a_plain_answer_has_one_form():
    assert forms(message("assistant", "so"), "{{ reasoning_content }}") == [Dialect()]


@pytest.mark.parametrize(
    "source, order",
    [
        ("split('</think>') m.reasoning_content", [AS_IS, "reasoning_content", WRITTEN]),
        ("{{ m.thinking }}", ["thinking", AS_IS, WRITTEN]),
        ("{{ m.content }}", [AS_IS, WRITTEN]),
        ("enable_thinking", [AS_IS, WRITTEN]),
    ],
)
def test_thinking_goes_where_the_template_takes_it(source, order):
    assert [form.thinking for form in forms(THINKS, source)] == order


def test_thinking_in_its_forms():
    plain = [message("assistant", "so")]
    assert Dialect().answer([THINKS]) == [THINKS]
    assert Dialect(thinking=WRITTEN).answer([THINKS]) == plain
    moved = Dialect(thinking="reasoning").answer([THINKS | {"thinking": "hmm"}])
    assert moved == [THINKS | {"reasoning": "hmm"}]
    assert Dialect(thinking="reasoning").prompt([THINKS]) == [THINKS], "earlier turns stay"


def test_calls_in_their_forms():
    assert len(forms(CALLS, "")) == 4
    for arguments in ({"number": 41}, '{"number": 41}'):
        call = CALLS["tool_calls"][0]
        call = call | {"function": call["function"] | {"arguments": arguments}}
        given = [CALLS | {"tool_calls": [call]}]
        (as_object,) = Dialect().answer(given)
        assert as_object == CALLS
        (as_text,) = Dialect(text_arguments=True, blank=None).answer(given)
        assert as_text["tool_calls"][0]["function"]["arguments"] == '{"number": 41}'
        assert as_text["content"] is None
    bare = Dialect().answer([CALLS | {"tool_calls": [{"name": "add", "arguments": "{}"}]}])
    assert bare[0]["tool_calls"] == [{"name": "add", "arguments": {}}]
    odd = Dialect().answer([CALLS | {"tool_calls": [{"name": "add", "arguments": "[1"}]}])
    assert odd[0]["tool_calls"] == [{"name": "add", "arguments": "[1"}], "not JSON: as it is"


def test_content_as_parts():
    (parts,) = Dialect(parts=True).prompt([user("a")])
    assert parts["content"] == [{"type": "text", "text": "a"}]


def test_what_is_left_out():
    prompt = [message("system", "be brief"), user("why?"), CALLS]
    assert left_out_of_prompt(prompt, "brief why add 41") is None
    assert left_out_of_prompt(prompt, "why add 41") == "prompt[0] (system)"
    assert left_out_of_prompt(prompt, "brief why 41") == "the tool calls of prompt[2]"
    assert left_out_of_prompt(prompt, "brief why add") == "the tool calls of prompt[2]"
    assert left_out_of_prompt([user("!?"), user('a "b\\n" c')], "") is None, "no word, or escapes"
    assert left_out_of_prompt([message("system", "/no_think"), user("hi /think")], "hi") is None
    for found in ("warum", "größer", "gr\\u00f6\\u00dfer"):
        missing = left_out_of_prompt([user("größer")], f"{found}?")
        assert (missing is None) == (found != "warum")
    assert left_out_of_answer([THINKS], "chosen", "hmm so") is None
    assert left_out_of_answer([THINKS], "chosen", "so") == "the thinking of chosen[0]"
    assert left_out_of_answer([THINKS], "chosen", "hmm") == "the content of chosen[0]"
    answer = [message("assistant", "so", reasoning="hmm")]
    assert left_out_of_answer(answer, "chosen", "so") == "the reasoning of chosen[0]"
