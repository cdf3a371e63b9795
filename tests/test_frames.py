"""Errors that say everything are short in a notebook: the lines of one's own, and the message."""

import linecache

import pytest

from dpo_fast import PreferenceRun, errors
from dpo_fast.losses.custom import told

CELL = """
def run():
    return PreferenceRun("m", output_dir="o", learning_rat=3)

run()
"""


@pytest.mark.parametrize("name", ["/tmp/ipykernel_1/2.py", "<ipython-input-3-4>"])
def test_a_notebook_shows_the_lines_of_the_cell_and_the_message(name):
    linecache.cache[name] = (len(CELL), None, CELL.splitlines(True), name)
    with pytest.raises(errors.UserError) as raised:
        exec(compile(CELL, name, "exec"), {"PreferenceRun": PreferenceRun})
    lines = raised.value._render_traceback_()  # what IPython asks an exception for
    shown = [line.strip() for line in lines if name in line or line.startswith("    ")]
    assert [line for line in shown if "run()" in line or "return" in line] == [
        "run()",
        'return PreferenceRun("m", output_dir="o", learning_rat=3)',
    ]
    assert lines[-1].startswith("UserError: PreferenceRun: there is no option learning_rat; did")
    assert len("\n".join(lines)) < 1200 and not any("api/options.py" in line for line in lines)


def test_all_that_end_a_run_by_their_message_are_told_so():
    kinds = (errors.UserError, errors.UnavailableError, errors.Interrupted, errors.Unhealthy)
    for kind in (*kinds, errors.LostPeer):
        assert kind("why")._render_traceback_() == [f"{kind.__name__}: why"]


def test_an_error_of_typed_code_has_its_place():
    with pytest.raises(ZeroDivisionError) as raised:
        exec(compile("\n1 / 0", "<stdin>", "exec"))
    assert told(raised.value) == "<stdin>, line 2: ZeroDivisionError: division by zero"
