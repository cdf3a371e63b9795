"""What rows say never reaches a terminal as an order to it, nor a page as HTML."""

import io
import json

import datasets
import pytest
from rich.console import Console

from dpo_fast.data.config import DataConfig
from dpo_fast.data.dataset import load_examples
from dpo_fast.data.report import render_examples, render_report
from dpo_fast.data.verdicts import BadRow
from dpo_fast.errors import UserError
from dpo_fast.training import console
from dpo_fast.wording import clipped, printable, quoted
from tests.support.tokenizers import CHATML, byte_tokenizer

# Sets the title of the window; clears it; turns the direction of writing; goes back over what was written.
ORDERS = "\x1b]0;owned\x07\x1b[2J\x9b2J\u202egnp.exe\u2066\r\x08\x00\x7f\x85\u2028"
HARMFUL = set(ORDERS) - set("owned2J[]0;gnp.exe")


def harmless(text: str) -> bool:
    return not HARMFUL & set(text)


@pytest.fixture
def load(tmp_path):
    def run(rows, name="a.jsonl", **options):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = DataConfig(
            train=str(tmp_path / name), cache_dir=str(tmp_path / "cache"), **options
        )
        return load_examples(config, byte_tokenizer(bos=True, template=CHATML), split="train")

    return run


def shown(examples) -> str:
    file = io.StringIO()
    terminal = Console(file=file, width=500, force_terminal=False)
    render_report(examples.report, terminal)
    render_examples(examples, byte_tokenizer(bos=True), terminal, n=10)
    return file.getvalue()


def test_rows_in_the_report_on_data(load):
    rows = [{"prompt": f"q{ORDERS}", "chosen": f"a{ORDERS}", "rejected": "b"}]
    rows += [{"prompt": [{"role": ORDERS, "content": "x"}], "chosen": "a", "rejected": "b"}]
    rows += [{"prompt": "q", "chosen": "a", "rejected": "b", ORDERS: 1}]
    text = shown(load(rows, f"{ORDERS.translate({0: None})}.jsonl", on_bad_row="skip"))
    assert harmless(text.replace("\n", ""))
    assert (
        "\\x1b" in text
        and "owned" in text
        and "unknown role" in text
        and "columns not used" in text
    )


@pytest.mark.parametrize("role", [ORDERS, "x" * 10**5])
def test_rows_in_errors(load, role):
    with pytest.raises(UserError) as error:
        load([{"prompt": [{"role": role, "content": "x"}], "chosen": "a", "rejected": "b"}])
    message = str(error.value)
    assert harmless(message) and "unknown role" in message and len(message) < 1500


def test_everything_that_is_said(capsys):
    console.say(f"a source: {ORDERS}")
    said = capsys.readouterr().err
    assert "\\x1b]0;owned\\x07" in said and harmless(said.strip("\n"))
    assert harmless(str(UserError(ORDERS))) and harmless(str(BadRow(ORDERS, ORDERS)))
    assert str(UserError("two\nlines\tof text: üß😀 中")) == "two\nlines\tof text: üß😀 中"


def test_words_for_messages():
    assert printable("a\x1b\ud800b") == "a\\x1b\\ud800b"
    assert clipped("x" * 200) == "x" * 200
    assert clipped("a" * 150 + "b" * 100 + "c" * 50, 200) == (
        "a" * 150 + " ... 100 characters ... " + "c" * 50
    )
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    assert quoted(deep) == "a list" and quoted(10**5000) == "a int" and quoted("ü\n") == "'ü\\n'"
    while deep:  # the recursion of its destruction is Python's own to bound
        deep = deep[0]


def test_a_saved_data_set_goes_the_same_way(load, tmp_path):
    datasets.Dataset.from_list([{"prompt": "q", "chosen": ORDERS, "rejected": "b"}]).save_to_disk(
        str(tmp_path / "saved")
    )
    config = DataConfig(train=str(tmp_path / "saved"), cache_dir=str(tmp_path / "cache"))
    examples = load_examples(config, byte_tokenizer(bos=True), split="train")
    assert harmless(shown(examples).replace("\n", ""))
