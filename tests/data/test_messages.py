"""Messages in the forms that people write them."""

import json
from datetime import datetime

import pytest

from dpo_fast.data.messages import check_messages
from dpo_fast.data.verdicts import BadRow


def say(role, content, **more):
    return {"role": role, "content": content, **more}


U, A = say("user", "hi"), say("assistant", "yes")


def test_messages_in_other_words():
    text = {"type": "text", "text": "hi"}
    for user in (
        {"from": "human", "value": "hi"},
        {"from": "User", "value": "hi"},
        say("user", [text]),
        say("user", ["h", {"type": "input_text", "text": "i"}]),
    ):
        assert check_messages([user], "prompt") == [U]
    turn = {"human": "hi", "assistant": "yes"}
    assert check_messages([turn, U], "prompt") == [U, A, U]
    weather, clock = {"name": "weather", "arguments": {"city": "Oslo"}}, {"name": "clock"}
    called = [say("user", "hi"), {"from": "function_call", "value": json.dumps(weather)}]
    called += [say("tool_call", json.dumps([clock])), {"from": "observation", "value": "12:00"}]
    calls = [{"type": "function", "function": each} for each in (weather, clock)]
    expected = [U, say("assistant", "", tool_calls=calls), say("tool", "12:00")]
    assert check_messages(called, "prompt") == expected
    as_text = say("assistant", None, tool_calls=json.dumps(calls))
    legacy = say("assistant", None, function_call=weather)
    assert check_messages([as_text], "chosen") == [expected[1]]
    assert check_messages([legacy], "chosen") == [say("assistant", "", tool_calls=calls[:1])]


def test_names_of_roles():
    for name in ("gpt", "AI", "bot", "model"):
        assert check_messages([say(name, "yes")], "chosen") == [A]
    for name in ("observation", "ipython", "function", "tool_result"):
        assert check_messages([say(name, "42")], "chosen") == [say("tool", "42")]


@pytest.mark.parametrize("empty", [[], None, "[]"])
def test_no_calls_are_none(empty):
    """Servers answer with an empty list, and Llama's template counts the calls of a list."""
    answer = A | {"tool_calls": empty, "refusal": None, "function_call": None}
    assert check_messages([U, answer], "chosen") == [U, A]


def test_a_call_after_words_is_of_the_same_turn():
    """As ms-swift has it: the words, then the calls, in messages of their own."""
    call, again = say("tool_call", '{"name": "f"}'), say("tool_call", '{"name": "g"}')
    (turn,) = check_messages([A, call, again], "chosen")
    assert turn["content"] == "yes"
    assert [each["function"]["name"] for each in turn["tool_calls"]] == ["f", "g"]
    (turn,) = check_messages([A | {"loss": False}, call | {"loss": False}], "chosen")
    assert turn["loss"] is False
    for first, second in ((A, call | {"loss": False}), (call, again | {"loss": False})):
        with pytest.raises(BadRow, match=r"two values of loss: chosen\[1\] is a call of the turn"):
            check_messages([first, second], "chosen")


def test_times_are_text():
    stamp = datetime(2024, 5, 1, 12)
    assert check_messages([U | {"at": stamp}], "p") == [U | {"at": "2024-05-01T12:00:00"}]


@pytest.mark.parametrize(
    "message, words",
    [
        (
            say("user", [{"type": "image_url", "image_url": {"url": "x"}}]),
            "part of type 'image_url'",
        ),
        (say("user", [{"type": "text"}]), "a part without text: prompt[0].content[0] has 'type'"),
        (say("user", [3]), "part of type 'int'"),
        ({"from": "function_call", "value": "weather()"}, "field 'prompt[0]' is not JSON"),
        ({"from": "function_call", "value": "{}"}, "a call without a name: prompt[0]"),
    ],
)
def test_what_messages_cannot_hold(message, words):
    with pytest.raises(BadRow) as caught:
        check_messages([message], "prompt")
    assert words in str(caught.value)
