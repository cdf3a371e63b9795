"""Secrets stay on the machine."""

import pytest

from dpo_fast.training.public import flat, public


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ({"api_key": "abc"}, {"api_key": "***"}),
        (
            {"extra": {"hub_token": "abc", "max_tokens": 5}},
            {"extra": {"hub_token": "***", "max_tokens": 5}},
        ),
        ({"api_key_env": "OPENAI_API_KEY"}, {"api_key_env": "OPENAI_API_KEY"}),
        ({"api_key_env": "sk-1234"}, {"api_key_env": "***"}),
        ({"url": "https://me:word@host/v1"}, {"url": "https://***@host/v1"}),
        ({"url": "https://host/v1?token=abc&n=1"}, {"url": "https://host/v1?token=***&n=1"}),
        ({"headers": {"Authorization": "Bearer x"}}, {"headers": {"Authorization": "***"}}),
        ({"train": ["a hf_0123456789abcdefghij"]}, {"train": ["a ***"]}),
        ({"eos_token_id": 5, "per_token": True}, {"eos_token_id": 5, "per_token": True}),
        (
            {"path": "sk-learn/model", "train": "data/a.jsonl"},
            {"path": "sk-learn/model", "train": "data/a.jsonl"},
        ),
    ],
)
def test_secrets_are_hidden_and_the_rest_is_not(value, shown):
    assert public(value) == shown


def test_options_by_their_dotted_names():
    assert dict(flat({"a": {"b": 1, "c": {}}, "d": [1]})) == {"a.b": 1, "a.c": {}, "d": [1]}
