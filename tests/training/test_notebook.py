"""Progress in a notebook, with a stand-in for its display."""

import sys
from types import ModuleType

import pytest

from dpo_fast.training import console
from dpo_fast.training.notebook import notebook_progress


@pytest.fixture
def shown(monkeypatch):
    """What was displayed: a list for every output, of the texts that stood there."""
    outputs = []

    class Handle:
        def __init__(self, content):
            self.texts = [content["text/plain"]]
            outputs.append(self.texts)

        def update(self, content, raw):
            assert raw
            self.texts.append(content["text/plain"])

    def display(content, raw, display_id):
        assert raw and display_id
        return Handle(content)

    module = ModuleType("IPython.display")
    module.display = display
    monkeypatch.setitem(sys.modules, "IPython", ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    return outputs


def test_one_line_is_written_over_and_short_work_shows_nothing(shown):
    now = [0.0]
    with notebook_progress("training", 100, 10, clock=lambda: now[0]) as advance:
        for _ in range(40):
            now[0] += 0.1
            advance(text="loss 0.5")
    (texts,) = shown
    assert texts[0] == "training: 30 of 100, 10.0 a second, 7 s left, loss 0.5"
    assert 4 <= len(texts) <= 6 and texts[-1].startswith("training: 50 of 100, 10.0 a second")
    with notebook_progress("evaluating", 5, clock=lambda: now[0]) as advance:
        now[0] += 1.0
        advance()
    assert len(shown) == 1


def test_the_bar_of_a_run_is_that_line_where_there_is_a_notebook(shown, monkeypatch):
    monkeypatch.setattr(console.console, "is_jupyter", True)
    monkeypatch.setattr("dpo_fast.training.notebook.DELAY", 0.0)
    monkeypatch.setattr("dpo_fast.training.notebook.EVERY", 0.0)
    for _ in console.track(range(3), "evaluating", 3):
        pass
    assert len(shown) == 1 and shown[0][-1].startswith("evaluating: 3 of 3, ")
