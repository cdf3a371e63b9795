"""Chat templates that fail, never end or are no templates are told as such, with the row."""

import json
import threading
import time

import pytest

from dpo_fast.data import chat
from dpo_fast.data.config import DataConfig
from dpo_fast.data.dataset import load_examples
from dpo_fast.data.stream import ExampleStream
from dpo_fast.data.time_limit import limited
from dpo_fast.errors import UserError
from tests.support.tokenizers import CHATML, byte_tokenizer

ROW = {
    "prompt": [{"role": "user", "content": "q"}],
    "chosen": [{"role": "assistant", "content": "yes"}],
    "rejected": [{"role": "assistant", "content": "no"}],
}
DEEP = "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}"
FAULTS = {
    "ZeroDivisionError": "{{ 1 / 0 }}",
    "RecursionError": DEEP,
    "ValueError": "{{ 'a' | int('b') | round(-1, 'x') }}",
    "FilterArgumentError": "{{ 1.5 | round(1, 'x') }}",
    "OverflowError": "{% for i in range(10 ** 9) %}{% endfor %}",
    "LookupError": "{{ 'a'.encode('no-such-code') }}",
    "UndefinedError": "{{ nothing.at.all }}",
    "TypeError": "{{ 1 + 'a' }}",
    "SecurityError": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "TemplateSyntaxError": "{% for %}",
    "raise_exception": "{{ raise_exception('no such\x1b[31m order') }}",
    "deeply nested": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "MemoryError": "{{ 'a' * (2 ** 62) }}",
}


def stream(tmp_path, template: str, **options) -> ExampleStream:
    (tmp_path / "a.jsonl").write_text((json.dumps(ROW) + "\n") * 2)
    (tmp_path / "a.jinja").write_text(template)
    config = DataConfig(
        train=str(tmp_path / "a.jsonl"),
        chat_template=str(tmp_path / "a.jinja"),
        streaming=True,
        **options,
    )
    return ExampleStream(config, byte_tokenizer(bos=True))


@pytest.mark.parametrize("what", FAULTS)
def test_a_template_that_fails_is_told_with_the_row(tmp_path, what):
    with pytest.raises(UserError) as error:
        stream(tmp_path, FAULTS[what]).read()
    message = str(error.value)
    assert f"{tmp_path}/a.jsonl:1: the chat template refuses the messages" in message
    assert f"data.chat_template={tmp_path}/a.jinja" in message and "\x1b" not in message
    with pytest.raises(UserError, match="none of 2 rows is usable. 2 x the chat template refuses"):
        stream(tmp_path, FAULTS[what], on_bad_row="skip").read()


LOOP = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3


@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
def test_a_template_that_never_ends(tmp_path, monkeypatch, on_bad_row):
    monkeypatch.setattr(chat, "SECONDS", 0.2)
    with pytest.raises(
        UserError, match=r"a.jsonl:1: .*a.jinja does not end: it took more than 0.2"
    ):
        stream(tmp_path, LOOP, on_bad_row=on_bad_row).read()


def test_a_template_that_never_ends_with_some_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(chat, "SECONDS", 0.2)
    template = "{% if messages[0].content == 'loop' %}" + LOOP + "{% endif %}" + CHATML
    row = {**ROW, "prompt": [{"role": "user", "content": "loop"}]}
    (tmp_path / "a.jinja").write_text(template)
    (tmp_path / "b.jsonl").write_text(json.dumps(ROW) + "\n" + json.dumps(row) + "\n")
    config = DataConfig(
        train=str(tmp_path / "b.jsonl"),
        chat_template=str(tmp_path / "a.jinja"),
        cache_dir=str(tmp_path / "cache"),
    )
    with pytest.raises(UserError, match="b.jsonl:2: .* does not end"):
        load_examples(config, byte_tokenizer(bos=True), split="train")


def test_a_limit_leaves_nothing_behind():
    """Calls that end near the limit: the exception arrives in them, or not at all. In other threads too."""

    def spin(seconds: float) -> int:
        end, turns = time.thread_time() + seconds, 0
        while time.thread_time() < end:
            turns += 1
        return turns

    outcomes = []

    def run() -> None:
        for seconds in (0.05, 0.1, 0.2, 0.3, 0.01):
            try:
                outcomes.append(limited(0.1, lambda seconds=seconds: spin(seconds)) > 0)
            except TimeoutError:
                outcomes.append(None)
            spin(0.02)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == 10 and outcomes.count(None) >= 1 and outcomes.count(True) >= 4
    with pytest.raises(ZeroDivisionError):
        limited(1, lambda: 1 // 0)
    with pytest.raises(TimeoutError, match="more than 0.1 s"):
        limited(0.1, lambda: spin(100))


def test_a_template_without_end():
    with pytest.raises(UserError, match="data.chat_template='/dev/zero' cannot be read: more than"):
        ExampleStream(
            DataConfig(train=__file__, chat_template="/dev/zero", streaming=True),
            byte_tokenizer(bos=True),
        )
