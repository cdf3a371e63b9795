"""Verdicts, rows of samples, and results in order."""

from __future__ import annotations

import threading
import time

import pytest

from dpo_fast.data.verdicts import BadRow
from dpo_fast.errors import UserError
from dpo_fast.judging.in_order import in_order
from dpo_fast.judging.lines import Lines, read_lines
from dpo_fast.judging.samples import read_rows, sample_row
from dpo_fast.judging.verdict import FAILED, Failures, Judged, Verdict, verdict_of
from tests.support.judging import row, write_rows

BAD = Verdict.without(FAILED, "gone")


def test_what_a_judge_may_answer():
    assert verdict_of(2) == Verdict(2.0) and verdict_of(True) == Verdict(1.0)
    words = [verdict_of(each).word for each in (None, "1", [1], float("nan"), 10**400)]
    assert words == ["refused", "unparsable", "unparsable", "unparsable", "unparsable"]


def test_failures_in_a_row_end_the_command_and_others_do_not():
    failures = Failures(3, "judge.type=rule", "Look at it.")
    failures.note(row("a", "b", "c"), Judged([BAD, BAD, Verdict(1.0)]))
    failures.note(row("a", "b"), Judged([BAD, BAD]))
    with pytest.raises(UserError, match=r"failed 3 times in a row .* for samples\.jsonl:8: gone"):
        failures.note(row("a", place=7), Judged([BAD]))
    by_row = Failures(2, "judge.type=command", "")
    by_row.note(row("a", "b"), Judged([BAD, BAD]), by_row=True)
    with pytest.raises(UserError, match="2 times"):
        by_row.note(row("a", "b"), Judged([BAD, BAD]), by_row=True)


def test_results_come_in_the_order_of_the_items_and_few_are_taken_ahead():
    taken = []

    def items():
        for index in range(20):
            taken.append(index)
            yield index

    def work(index):
        time.sleep(0.01 * (index % 3 == 0))
        return index

    results = in_order(work, items(), 3)
    assert next(results) == 0 and len(taken) <= 6
    assert list(results) == list(range(1, 20))


def test_an_error_does_not_wait_for_what_has_begun():
    waiting = threading.Event()

    def work(index):
        if index == 0:
            raise KeyError("first")
        waiting.wait(20)

    start = time.monotonic()
    with pytest.raises(KeyError):
        list(in_order(work, range(4), 2))
    assert time.monotonic() - start < 10
    waiting.set()


def test_a_row_may_come_from_another_tool(tmp_path):
    message = [{"role": "assistant", "content": "hello"}]
    rows = [{"prompt": "q", "completions": [message, "text"], "finish_reasons": None}]
    (read,) = read_rows(write_rows(tmp_path / "own.jsonl", rows))
    assert read.completions == ["hello", "text"] and not read.unfinished(0)
    import pyarrow
    import pyarrow.parquet

    content = {
        "prompt": ['[{"role": "user", "content": "q"}]', "[{no message"],
        "completions": [["a", "b"]] * 2,
        "finish_reasons": [["length", "stop"]] * 2,
        "row": ['{"answer": 3}', None],
    }
    pyarrow.parquet.write_table(pyarrow.table(content), tmp_path / "own.parquet")
    read, text = read_rows(tmp_path / "own.parquet")
    assert read.completions == ["a", "b"] and read.unfinished(0) and not read.unfinished(1)
    assert read.messages == [{"role": "user", "content": "q"}] and read.columns == {"answer": 3}
    assert text.prompt == "[{no message"


def test_messages_of_a_row_begin_with_its_system_once():
    own = [{"role": "system", "content": "own"}, {"role": "user", "content": "q"}]
    assert row("a", prompt=own, system="other").messages == own
    assert [m["role"] for m in row("a", prompt="q", system="s").messages] == ["system", "user"]
    assert row("a", id=1, row={"right": 3, "id": 2}).columns == {"right": 3, "id": 1}
    assert row("a", right=3, logps=[1.0], finish_reasons=["stop"]).columns == {"right": 3}


def test_a_completion_of_several_messages_is_no_text():
    with pytest.raises(BadRow, match=r"completions\[0\] is no text"):
        sample_row(0, "x", {"prompt": "q", "completions": [[{"role": "user", "content": "a"}] * 2]})


def test_lines_go_on_after_one_that_was_cut_off(tmp_path):
    file = tmp_path / "below/lines.jsonl"
    lines = Lines(file, "make room")
    lines.append({"a": "ü"})
    lines.close()
    with file.open("ab") as stream:
        stream.write(b'{"b": 1')
    lines.append({"c": 2})
    lines.close()
    assert list(read_lines(file)) == [{"a": "ü"}, {"c": 2}]


def test_samples_of_other_tools_keep_thinking_and_turns():
    thought = {"role": "assistant", "content": "4", "reasoning_content": "2 and 2"}
    prompt = [{"from": "human", "value": "2 + 2?"}]
    read = sample_row(0, "own:1", {"prompt": prompt, "completions": [[thought], "4"]})
    assert read.prompt == [{"role": "user", "content": "2 + 2?"}]
    assert read.completions == ["<think>\n2 and 2\n</think>\n\n4", "4"]
    said = [{"from": "gpt", "value": "5"}]
    assert sample_row(0, "own:2", {"prompt": "q", "completions": [said]}).completions == ["5"]
