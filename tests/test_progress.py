"""Long passes without a terminal."""

import pytest

from dpo_fast.progress import SpokenProgress, duration, shown


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def spoken(total: int | None, parts: int, seconds: float, done: int = 0) -> list[str]:
    """What is said of a pass whose parts take so long each."""
    lines, clock = [], Clock()
    progress = SpokenProgress("evaluating", total, lines.append, done=done, clock=clock)
    for part in range(parts):
        clock.now += seconds
        progress.advance(text=f"part {part}")
    return lines


def test_a_line_every_half_minute():
    lines = spoken(200, 200, 0.5)
    assert lines == [
        "evaluating: 60 of 200, 2.0 a second, 70 s left, part 59",
        "evaluating: 120 of 200, 2.0 a second, 40 s left, part 119",
        "evaluating: 180 of 200, 2.0 a second, 10 s left, part 179",
    ]


def test_a_short_pass_says_nothing():
    assert spoken(100, 100, 0.25) == []


def test_slow_parts_and_parts_done_before():
    assert spoken(10, 2, 60.0, done=4) == [
        "evaluating: 5 of 10, 60.0 s each, 5 min left, part 0",
        "evaluating: 6 of 10, 60.0 s each, 4 min left, part 1",
    ]


def test_lines_of_others_count():
    """Training says a line for every step: nobody needs another between them."""
    lines, clock, said = [], Clock(), [0.0]
    progress = SpokenProgress("training", 9, lines.append, clock=clock, heard=lambda: said[0])
    for _ in range(4):
        clock.now += 20.0
        said[0] = clock.now
        progress.advance()
    assert lines == []
    clock.now += 30.0
    progress.advance()
    assert len(lines) == 1


def test_without_a_total():
    assert spoken(None, 31_000, 0.001) == ["evaluating: 30,000, 1,000.0 a second, part 29999"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (99, "99 s"), (100, "2 min"), (5400, "90 min"), (12_000, "3 h 20 min")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_passes_of_a_run_speak_without_a_terminal(monkeypatch, capsys):
    pytest.importorskip("rich")
    from dpo_fast.training.console import track

    monkeypatch.setattr("dpo_fast.progress.EVERY", 0.0)
    assert list(track("abc", "evaluating", 3)) == ["a", "b", "c"]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and lines[-1].startswith("evaluating: 3 of 3, ")


def test_what_is_shown_without_a_terminal(monkeypatch, capsys):
    clock = Clock()
    defaults = SpokenProgress.__init__.__kwdefaults__ | {"clock": clock}
    monkeypatch.setattr(SpokenProgress.__init__, "__kwdefaults__", defaults)
    with shown("reading rows", None) as advance:
        for _ in range(50):
            clock.now += 1
            advance(1000)
    assert capsys.readouterr().err == "reading rows: 30,000, 1,000.0 a second\n"
