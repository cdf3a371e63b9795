"""Messages in the forms that people write them."""

import json

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
