"""Single values of a row."""

from decimal import Decimal

import pytest

from dpo_fast.data.files import Cell
from dpo_fast.data.values import items, label, number, seen, text_or_messages
from dpo_fast.data.verdicts import BadRow

MESSAGE = {"role": "user", "content": "hi"}


def test_text_that_is_json_of_messages_is_messages():
    assert text_or_messages(' [ {"role": "user", "content": "hi"}]', "prompt") == [MESSAGE]
    for text in ('[{"a": 1}]', "[{ is how a list begins", '["role"]', "[]", '{"role": "user"}'):
        assert text_or_messages(text, "prompt") == text
    assert type(text_or_messages(Cell("so"), "prompt")) is str


@pytest.mark.parametrize(
    "text, value", [("1", True), ("0", False), ("True", True), ("false", False)]
)
def test_labels_of_cells(text, value):
    assert label(Cell(text)) is value
    with pytest.raises(BadRow, match="not a bool"):
        label(text)  # of a file with types, where it is text


def test_numbers_and_lists_of_cells():
    assert number(Cell("-1.5"), "margin") == -1.5
    assert number(Decimal("0.5"), "weight") == 0.5  # as DuckDB and Spark write 0.5 into Parquet
    assert items({"scores": Cell("[1, 2]")}, {}, "scores") == [1, 2]
    for value in ("1", Cell("one"), Cell("true"), True, None):
        with pytest.raises(BadRow, match="field 'margin' is not a number"):
            number(value, "margin")
    with pytest.raises(BadRow, match="field 'scores' is not a list"):
        items({"scores": Cell("1")}, {}, "scores")


def test_what_a_column_may_be_called_instead():
    assert "did you mean 'Better'?" in seen({"Better": 1, "Worse": 2}, "chosen")
    assert "did you mean 'promt'?" in seen({"promt": 1}, "prompt")
    assert seen({"x": 1}, "chosen") == "the row has 'x'"
