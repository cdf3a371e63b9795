"""The report of a run: a hand-made folder in, one whole HTML page out."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from dpo_fast.data.report import DataReport
from dpo_fast.data.verdicts import Tally
from dpo_fast.errors import UserError
from dpo_fast.numbers import MINUS, number, percent
from dpo_fast.report import write_report
from dpo_fast.report.chart import MOST_POINTS, smooth, thin
from dpo_fast.report.histogram import count, edges
from dpo_fast.report.scale import tick_labels, ticks
from tests.support.run_folder import (
    HOSTILE,
    LN2,
    eval_line,
    make,
    train_line,
    usual,
    write_examples,
    write_facts,
)

VOID = {"meta", "line", "circle", "polyline", "polygon", "br"}


class Page(HTMLParser):
    """Checks that tags are balanced; gathers text, tags, and curves by (title, name)."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.texts: list[str] = []
        self.curves: dict[tuple[str, str], dict] = {}
        self.areas: dict[tuple[str, str], dict] = {}  # counts and words of bins
        self.title = ""
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        if tag == "svg":
            self.title = attrs.get("aria-label", "")
        if "data-bins" in attrs:
            counts = [
                int(each.split()[0].replace(",", "")) for each in attrs["data-bins"].split("|")
            ]
            words = attrs["data-ranges"].split("|")
            self.areas[self.title, attrs["data-name"]] = {"counts": counts, "words": words}
        if "data-values" in attrs:
            pairs = [pair.split(",") for pair in attrs["data-values"].split()]
            self.curve = {
                "values": [(float(a), float(b)) for a, b in pairs],
                "lines": [],
                "dots": 0,
            }
            self.curves[self.title, attrs["data-name"]] = self.curve
        if tag == "polyline" and self.title:
            self.curve["lines"].append(len(attrs["points"].split()))
        if tag == "circle" and self.title:
            self.curve["dots"] += 1
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert tag in VOID
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def read(folder: Path) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


def test_curves_have_a_place_for_every_point(tmp_path):
    page = read(make(tmp_path, usual()))
    train, evaluation = page.curves["Loss", "train"], page.curves["Loss", "eval"]
    assert train["lines"] == [10] and train["dots"] == 0
    assert evaluation["lines"] == [3] and evaluation["dots"] == 3
    expected = [(step, LN2 - 0.03 * step) for step in range(1, 11)]
    assert train["values"] == [pytest.approx(pair, rel=1e-5) for pair in expected]
    titles = {title for title, _ in page.curves}
    assert titles == {
        "Loss",
        "Accuracy",
        "Margin",
        "Rewards, chosen and rejected",
        "Chosen log-probability",
        "Rejected log-probability",
        "Gradient norm",
        "Learning rate",
        "Entropy",
        "Pairs per second",
        "Tokens per second",
        "perf/padding_fraction",
    }
    assert {name for title, name in page.curves if title.startswith("Rewards")} == {
        "chosen",
        "rejected",
    }


def test_places_follow_the_values(tmp_path):
    """A falling loss goes down on the page, evenly and within the plot."""
    source = write_report(make(tmp_path, usual())).read_text()
    chart = source[source.index('aria-label="Loss"') :]
    points = re.search(r'class="line" points="([^"]*)"', chart).group(1)
    places = [tuple(map(float, pair.split(","))) for pair in points.split()]
    for axis, least, most in ((0, 46, 338), (1, 22, 206)):
        steps = [b[axis] - a[axis] for a, b in zip(places, places[1:])]
        assert all(step == pytest.approx(steps[0], abs=0.21) and step > 0 for step in steps)
        assert all(least <= place[axis] <= most for place in places)
    assert places[-1][0] == 338


def test_first_and_last_numbers(tmp_path):
    text = read(make(tmp_path, usual())).text
    assert "Eval accuracy 50 % → 80 % step 0 → 10" in text
    assert "Eval margin 0 → 0.5000" in text
    assert "Eval loss 0.6931 → 0.3931" in text
    assert "75.50 pairs/s median, 2,000 tokens/s, 2 % padding" in text


def test_a_margin_of_rounding_is_0(tmp_path):
    lines = changed("eval_", "rewards/margins", lambda step: 0.05 * step or -7.6e-9)
    assert "Eval margin 0 → 0.5000" in read(make(tmp_path, lines)).text


def test_without_evaluation_training_is_summed_up(tmp_path):
    page = read(make(tmp_path, [train_line(step) for step in (2, 4)]))
    assert "Train accuracy 56 % → 62 % step 2 → 4" in page.text
    assert ("Loss", "eval") not in page.curves


def test_the_page_needs_nothing_else(tmp_path):
    source = write_report(make(tmp_path, usual())).read_text()
    assert (
        "http:" not in source
        and "https:" not in source
        and "@import" not in source
        and "url(" not in source
    )
    assert not any("src" in attrs or "href" in attrs for _, attrs in Page(source).tags)
    assert "prefers-color-scheme: dark" in source
    assert [path.name for path in tmp_path.glob("*report*")] == ["report.html"]


def test_hostile_text_stays_text(tmp_path):
    make(tmp_path, usual(), log={"run_name": HOSTILE}, model={"path": HOSTILE}, odd=HOSTILE)
    tally = Tally({HOSTILE: 2}, {HOSTILE: [(HOSTILE, HOSTILE)]})
    report = DataReport([HOSTILE], 10, 8, bad=tally, ignored_columns=[HOSTILE])
    (tmp_path / "data-report.json").write_text(report.to_json())
    sample = {"prompt": HOSTILE, "before": HOSTILE, "after": HOSTILE, "right": HOSTILE}
    (tmp_path / "samples.json").write_text(json.dumps([sample]))
    page = read(tmp_path)
    assert not any(tag == "img" for tag, _ in page.tags)
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    assert page.text.count(HOSTILE) >= 10


def test_what_the_loader_kept_and_dropped(tmp_path):
    make(tmp_path, usual())
    report = DataReport(
        ["pairs.jsonl"],
        1000,
        950,
        50,
        Tally({"no answer": 30}, {"no answer": [("f:7", "x")]}),
        Tally({"too long": 20}, {"too long": []}),
        prompts_cut=3,
        lengths={"prompt": {"p50": 12, "max": 4321}},
        tokens={"prompt": 98765},
    )
    (tmp_path / "data-report.json").write_text(report.to_json())
    text = read(tmp_path).text
    assert "rows read 1,000 100 %" in text and "used for training 900 90 %" in text
    assert "bad row: no answer first: f:7 30 3 %" in text and "dropped: too long 20 2 %" in text
    assert "3 of 950 prompts were cut" in text and "4,321 98,765" in text


def test_samples_show_only_what_there_is(tmp_path):
    make(tmp_path, usual())
    samples = [{"prompt": "2+2", "before": "5", "after": "", "right": None}]
    (tmp_path / "samples.json").write_text(json.dumps(samples))
    assert "2+2 Before 5 After empty" in read(tmp_path).text
    assert "Right answer" not in read(tmp_path).text


def test_metrics_alone_are_enough(tmp_path):
    make(tmp_path, usual())
    (tmp_path / "config.yaml").unlink()
    page = read(tmp_path)
    assert page.curves["Loss", "train"]["lines"] == [10]
    for absent in ("Data", "Answers before and after", "Resolved configuration", "ln 2."):
        assert absent not in page.texts
    assert "Too little was logged to check: start at ln 2" in page.text


@pytest.mark.parametrize(
    "line", [train_line(3), eval_line(0), {"step": 1}, {"step": 1, "loss": None}, {"loss": 0.5}]
)
def test_a_single_line(tmp_path, line):
    page = read(make(tmp_path, [line]))
    assert all(curve["dots"] == 1 and curve["lines"] == [] for curve in page.curves.values())
    assert bool(page.curves) == (len(line) > 2)


def test_gaps_are_left_out(tmp_path):
    lines = usual()
    lines[3]["grad_norm"] = None
    lines[4]["loss"], lines[5]["loss"] = math.nan, math.inf
    del lines[6]["entropy"]
    lines[7]["logps/chosen"] = "text"
    page = read(make(tmp_path, lines))
    lengths = {
        title: curve["lines"][0] for (title, n), curve in page.curves.items() if n == "train"
    }
    assert lengths["Gradient norm"] == lengths["Entropy"] == 9
    assert lengths["Loss"] == 8 and lengths["Chosen log-probability"] == 9
    assert lengths["Margin"] == 10
    assert "loss was NaN or infinite at step 4" in page.text
    assert "nan" not in " ".join(str(attrs) for _, attrs in page.tags).lower()


def test_steps_trained_again_count_once(tmp_path):
    lines = [train_line(1), train_line(2, loss=9.0), train_line(2, loss=0.25), train_line(3)]
    curve = read(make(tmp_path, lines)).curves["Loss", "train"]
    assert [step for step, _ in curve["values"]] == [1, 2, 3] and curve["values"][1][1] == 0.25


@pytest.mark.parametrize(("values", "seen"), [((math.nan, 0.5), False), ((0.5, math.nan), True)])
def test_a_step_trained_again_is_judged_by_its_last_line(tmp_path, values, seen):
    page = read(make(tmp_path, [train_line(1, loss=value) for value in values]))
    assert ("loss was NaN" in page.text) == seen and (("Loss", "train") in page.curves) != seen


@pytest.mark.parametrize("broken", ['{"step": 3, "lo', "[1, 2]", "3"])
def test_a_broken_line_is_named(tmp_path, broken):
    path = make(tmp_path, [train_line(1), train_line(2)]) / "metrics.jsonl"
    path.write_text(path.read_text() + "\n" + broken + "\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 4 .*Delete that line"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("content", [None, "", "\n \n"])
def test_no_metrics(tmp_path, content):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(UserError, match=r"metrics\.jsonl (does not exist\. Name|is empty\. Write)"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.yaml", "a: [1"),
        ("data-report.json", "{}"),
        ("data-report.json", "[]"),
        ("samples.json", "{"),
        ("samples.json", "[1]"),
        ("samples.json", "[" * 100_000),
        ("eval-examples.json", "[]"),
        ("eval-examples.json", '{"fields": ["margin"], "rows": [[1], [2, 3]]}'),
        ("eval-examples.json", '{"fields": ["margin"], "rows": [[1e999]]}'),
        ("eval-examples.json", '{"fields": ["margin"], "rows": [["much"]]}'),
        ("run.json", '{"starts": 3}'),
        ("run.json", '{"starts": [], "lengths": {"prompt": {"width": "wide"}}}'),
    ],
)
def test_a_broken_companion_is_named(tmp_path, name, content):
    make(tmp_path, usual())
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=re.escape(name)):
        write_report(tmp_path)


FINDINGS = {
    "start": "and not ln 2 = 0.6931",
    "chosen": "The chosen log-probability falls",
    "pinned": "accuracy stays at",
    "flat": "The loss does not fall",
    "rises": "The loss rises",
    "turn": "The evaluation loss was least at step 5",
    "by heart": "while the training loss falls",
}


def found(folder: Path) -> set[str]:
    text = read(folder).text
    return {name for name, sentence in FINDINGS.items() if sentence in text}


def test_a_run_in_order_has_no_findings(tmp_path):
    assert found(make(tmp_path, usual())) == set()
    assert "In order: all values finite, start at ln 2, loss falls" in read(tmp_path).text


def changed(kind: str, name: str, values) -> list[dict]:
    """The usual run with another course of one metric; `values` by step."""
    lines = usual()
    for line in lines:
        if kind + name in line:
            line[kind + name] = values(line["step"])
    return lines


NOISE = (0.1, -0.05, 0.02, -0.12, 0.08, 0.0, -0.03)


def longer(evaluation, training) -> list[dict]:
    """Forty steps, with these losses by step; without evaluation if that is None."""
    lines = [train_line(step, loss=training(step)) for step in range(1, 41)]
    if evaluation is not None:
        lines += [eval_line(step, eval_loss=evaluation(step)) for step in (0, 20, 40)]
    accuracies = dict.fromkeys(("rewards/accuracies", "eval_rewards/accuracies"), 0.7)
    return [
        line | {name: value for name, value in accuracies.items() if name in line} for line in lines
    ]


def test_four_steps_say_nothing_of_a_small_fall(tmp_path):
    lines = [train_line(step, loss=LN2 - 0.0013 * step) for step in range(1, 5)]
    make(tmp_path, [*lines, eval_line(0), eval_line(4, eval_loss=0.6879)])
    assert found(tmp_path) == set()
    lines = [train_line(step, loss=LN2 + 1e-4 * step) for step in range(1, 5)]
    make(tmp_path, [*lines, eval_line(0), eval_line(4, eval_loss=0.6935)])
    assert found(tmp_path) == set()
    assert "check: loss falls" in read(tmp_path).text.replace("Too little was logged to ", "")


def rounded(rewards: float) -> list[dict]:
    """A run whose evaluation starts 0.02 off ln 2 and whose rewards rounding moves by so much."""
    lines = changed("eval_", "loss", lambda step: LN2 + 0.02 - 0.03 * step)
    lines[0] |= {"start/rewards": rewards}
    return lines


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (changed("eval_", "loss", lambda step: 0.9 - 0.03 * step), {"start"}),
        (changed("eval_", "loss", lambda step: LN2 + 5e-4 - 0.03 * step), set()),
        (rounded(0.03), set()),
        (rounded(0.01), {"start"}),
        (changed("eval_", "logps/chosen", lambda step: -40.0 - step), {"chosen"}),
        (changed("eval_", "logps/chosen", lambda step: -40.0 - 0.01 * step), set()),
        (changed("", "rewards/accuracies", lambda step: float(step > 2)), {"pinned"}),
        (changed("eval_", "rewards/accuracies", lambda step: 0.0), {"pinned"}),
        (changed("", "rewards/accuracies", lambda step: 0.99), set()),
        # Ten steps without a fall say nothing, and a rise says something.
        (changed("eval_", "loss", lambda step: LN2), set()),
        (changed("eval_", "loss", lambda step: LN2 + 0.0065 * step), {"by heart"}),
        (longer(lambda step: LN2, lambda step: LN2 - 0.01 * step), {"by heart"}),
        (longer(lambda step: LN2, lambda step: LN2), {"flat"}),
        (longer(lambda step: LN2 + 0.01 * step, lambda step: LN2 + 0.01 * step), {"rises"}),
        (longer(lambda step: LN2 - 2e-4 * step, lambda step: LN2), set()),
        # Batches of few pairs: a fall of 0.02 within noise of 0.1 is none.
        (longer(None, lambda step: LN2 - 5e-4 * step + NOISE[step % len(NOISE)]), {"flat"}),
        (longer(None, lambda step: LN2 - 5e-3 * step + NOISE[step % len(NOISE)]), set()),
        (changed("eval_", "loss", lambda step: {0: LN2, 5: 0.4, 10: 0.5}[step]), {"turn"}),
    ],
)
def test_findings(tmp_path, lines, expected):
    assert found(make(tmp_path, lines)) == expected


@pytest.mark.parametrize(
    "config",
    [
        {"loss": {"type": "ipo"}},
        {"loss": {"type": ["sigmoid", "sft"]}},
        {"loss": {"type": "sigmoid", "weights": [2.0]}},
        {"reference": {"path": "another"}},
    ],
)
def test_ln2_is_expected_of_plain_sigmoid_only(tmp_path, config):
    lines = changed("eval_", "loss", lambda step: 0.9 - 0.03 * step)
    assert found(make(tmp_path, lines, **config)) == set()


def test_weights_and_margins_of_pairs_move_the_start(tmp_path):
    lines = changed("eval_", "loss", lambda step: 0.9 - 0.03 * step)
    lines[0] |= {"start/expected": 0.91}
    assert found(make(tmp_path, lines)) == set()
    lines[0] |= {"start/expected": LN2 + 1e-7}
    assert found(make(tmp_path, lines)) == {"start"}


def test_training_alone_shows_a_flat_loss_and_a_falling_chosen(tmp_path):
    lines = [
        train_line(step, loss=LN2, **{"logps/chosen": -40.0 - step, "rewards/chosen": -0.1 * step})
        for step in range(1, 29)
    ]
    assert found(make(tmp_path, lines)) == {"flat", "chosen"}


def test_a_long_run_is_thinned_and_smoothed():
    points = [(float(step), float(step % 7)) for step in range(50_000)]
    points[777] = (777.0, 99.0)
    kept = thin(points)
    assert len(kept) <= MOST_POINTS + 1 and kept[-1] == points[-1] and kept == sorted(kept)
    assert (777.0, 99.0) in kept
    level = smooth([(float(step), 3.0) for step in range(100)])
    assert [value for _, value in level] == pytest.approx([3.0] * 100)
    alternating = smooth([(float(step), float(step % 2)) for step in range(400)])
    assert all(0.3 < value < 0.7 for _, value in alternating)


def test_ticks_are_round_and_within():
    assert ticks(0, 14, whole=True) == [0, 5, 10]
    assert ticks(0.53, 0.70) == pytest.approx([0.55, 0.6, 0.65, 0.7])
    assert ticks(3, 3) == [3]
    for low, high in ((-3.1, 0.2), (0, 1e-7), (1e8, 3e9), (5.5565, 5.5584)):
        marks = ticks(low, high)
        assert 2 <= len(marks) <= 6 and low <= marks[0] and marks[-1] <= high * (1 + 1e-9)
        assert len(set(tick_labels(marks))) == len(marks)
    assert tick_labels([0, 2e-7]) == ["0", "2e\N{MINUS SIGN}7"]
    assert tick_labels([0, 20000]) == ["0", "20k"]


def test_numbers_for_people():
    values = (0, 0.69314, 5.5567, 71.74, 1848.4, -38.765, 2.5e-7, 1.23e10)
    expected = "0 0.6931 5.557 71.74 1,848 -38.77 2.5e-7 1.23e10".replace("-", "\N{MINUS SIGN}")
    assert [number(value) for value in values] == expected.split()
    texts = ["50 %", "100 %", "99.9 %", "<0.1 %", "0 %"]
    assert [percent(value) for value in (0.5, 1, 0.99999, 1e-6, 0)] == texts


def test_what_losses_estimate_has_panels_of_its_own(tmp_path):
    names = {
        "kl": "KL",
        "delta": "Delta",
        "clip_ratio/region_mean": "Clipped tokens",
        "log_odds": "Log-odds",
        "perf/mfu": "Model flops utilisation",
    }
    lines = [train_line(step, **dict.fromkeys(names, 0.1 * step)) for step in range(1, 6)]
    (tmp_path / "with").mkdir()
    (tmp_path / "without").mkdir()
    titles = {title for title, _ in read(make(tmp_path / "with", lines)).curves}
    assert set(names.values()) <= titles
    others = {title for title, _ in read(make(tmp_path / "without", usual())).curves}
    assert not set(names.values()) & others


@pytest.mark.parametrize("torn", ['{"step": 11, "lo', "{", "3"])
def test_half_a_last_line_is_left_out_and_said(tmp_path, torn):
    """So a run that is going on has a report, and so has one that was killed."""
    path = make(tmp_path, usual()) / "metrics.jsonl"
    path.write_text(path.read_text() + torn)
    page = read(tmp_path)
    assert "from 13 lines of metrics.jsonl. The last line is half-written" in page.text
    assert page.curves["Loss", "train"]["values"][-1][0] == 10
    path.write_text(path.read_text().removesuffix(torn) + json.dumps(train_line(11)))
    page = read(tmp_path)
    assert page.curves["Loss", "train"]["values"][-1][0] == 11 and "half-written" not in page.text


def test_a_run_that_is_going_on_is_told_from_a_finished_one(tmp_path):
    make(tmp_path, usual(), train={"max_steps": 40})
    assert "Not finished: 10 of 40 steps, and no trained model" in read(tmp_path).text
    lines = [{"step": 0, "total_steps": 30}, *usual()]
    assert "Not finished: 10 of 30 steps" in read(make(tmp_path, lines)).text
    make(tmp_path, usual(), train={"num_train_epochs": 3})  # five steps are an epoch
    assert "Not finished: 10 of 15 steps" in read(tmp_path).text
    (tmp_path / "final").mkdir()
    assert "Not finished" not in read(tmp_path).text


HOLD = """
import fcntl, os, sys
file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.processes
def test_a_run_that_holds_its_folder_is_going_on(tmp_path):
    make(tmp_path, usual(), train={"max_steps": 40})
    arguments = [sys.executable, "-c", HOLD, tmp_path / ".lock"]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as run:
        assert run.stdout.readline() == b"held\n"
        assert "The run is going on: 10 of 40 steps so far." in read(tmp_path).text
        run.stdin.close()
        run.wait(10)
    assert "Nothing runs in the folder now" in read(tmp_path).text


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("absent", "absent does not exist. Name the folder of a run"),
        ("final", "final lies in the folder of a run. Name that: "),
        ("metrics.jsonl", "metrics.jsonl is a file. Name the folder of a run"),
        ("fresh", "the run has not logged a line yet"),
    ],
)
def test_a_folder_that_is_no_run_is_told(tmp_path, place, message):
    for name in ("run/final", "fresh"):
        (tmp_path / name).mkdir(parents=True)
    make(tmp_path / "run", usual())
    (tmp_path / "fresh/config.yaml").write_text("{}")
    folder = tmp_path / ("fresh" if place == "fresh" else f"run/{place}")
    with pytest.raises(UserError, match=re.escape(message)):
        write_report(folder)


def test_margins_of_examples_are_counted_and_told(tmp_path):
    write_examples(make(tmp_path, usual()))
    page = read(tmp_path)
    found = {
        name: area for (title, name), area in page.areas.items() if title.startswith("Margins")
    }
    assert sum(found["pairs"]["counts"]) == 40
    below = sum(n for n, words in zip(*found["pairs"].values()) if words.startswith(MINUS))
    assert below == 10  # margins from -1 to -0.1; that of 0 lies in a bin above
    assert "At step 10. Above 0 the better answer wins: 72.5 %. " in page.text
    assert {name for title, name in page.areas if title == "Rewards of held-out pairs"} == {
        "chosen",
        "rejected",
    }


def test_completions_have_rewards_by_label(tmp_path):
    write_examples(make(tmp_path, usual()), kind="completions")
    page = read(tmp_path)
    areas = {name: sum(area["counts"]) for (_, name), area in page.areas.items()}
    assert areas == {"desirable": 20, "undesirable": 20}
    assert "Completions per second" in {title for title, _ in page.curves}


def test_worst_and_best_examples_have_their_texts(tmp_path):
    write_examples(make(tmp_path, usual()), text="the words")
    page = read(tmp_path)
    assert page.text.count("the words.jsonl:7") == 6 and "Worst and best pairs" in page.text
    assert (
        f"margin {MINUS}1.000 · the words.jsonl:7 the words chosen, reward 0, 5 tokens" in page.text
    )
    assert "2 more" in page.text and "margin 2.900" in page.text
    content = json.loads((tmp_path / "eval-examples.json").read_text())
    (tmp_path / "eval-examples.json").write_text(
        json.dumps(content | {"least": [], "greatest": []})
    )
    page = read(tmp_path)
    assert "the words" not in page.text and "Margins of held-out pairs" in page.text


def test_lengths_machine_and_resumptions(tmp_path):
    write_facts(make(tmp_path, usual()), 0, 6)
    page = read(tmp_path)
    assert page.areas["Prompt length", "prompt"]["counts"] == [0, 3, 5, 2]
    words = page.areas["Answer length", "chosen"]["words"]
    assert words[1] == "2 to 3" and words[-1] == "80 or more" and len(words) == 41
    assert "The longest has 99 tokens" in page.text
    assert "6 2026-11-27 01:02:03 UTC 2 a device a system torch 2.10.0" in page.text
    source = (tmp_path / "report.html").read_text()
    assert source.count('class="resumed"') == len({title for title, _ in page.curves})


def test_metrics_of_other_versions_are_shown(tmp_path):
    lines = [train_line(step, **{"perf/pairs_per_second": 7.0, "odd/new": 1.0}) for step in (1, 2)]
    for line in lines:
        del line["perf/examples_per_second"]
    page = read(make(tmp_path, lines))
    assert page.curves["Pairs per second", "train"]["values"] == [(1, 7), (2, 7)]
    assert page.curves["odd/new", "train"]["values"] == [(1, 1), (2, 1)]
    lines[0]["data/answer_tokens"] = 123.5
    page = read(make(tmp_path, lines))
    assert "data/answer_tokens 123.5" in page.text  # logged once: no chart
    assert ("data/answer_tokens", "train") not in page.curves


def test_what_json_cannot_hold_is_null_and_told(tmp_path):
    lines = usual()
    lines[3] |= {"grad_norm": None, "nonfinite": {"grad_norm": "inf"}}
    page = read(make(tmp_path, lines))
    assert "grad_norm was NaN or infinite at step 3" in page.text
    assert page.curves["Gradient norm", "train"]["lines"] == [9]


def test_control_characters_are_made_visible(tmp_path):
    odd = "a\x1b[31mb\x00c\u202ed\ud800e\x9bf\r\ng"
    write_examples(make(tmp_path, usual(), log={"run_name": odd}), text=odd)
    source = write_report(tmp_path).read_bytes().decode("utf-8")
    assert not set(source) & set("\x1b\x00\u202e\x9b\r")
    assert "a\u241b[31mb\u2400c\\u202ed\ufffde\\x9bf\ng" in source


@pytest.mark.parametrize("fault", ["full", "file"])
def test_a_report_that_cannot_be_written_is_told(tmp_path, monkeypatch, fault):
    make(tmp_path, usual())
    out = None
    if fault == "full":

        def full(self, content):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, "write_bytes", full)
    else:
        out = tmp_path / "metrics.jsonl" / "page.html"
    with pytest.raises(UserError, match="cannot be written.*name another place with --out"):
        write_report(tmp_path, out)
    assert not (tmp_path / "report.html").exists()


def test_bins_are_round_and_hold_far_values():
    first, width, bins = edges(sorted([-0.33, 0.1, 0.2, 0.4, 0.9]))
    assert width == 0.05 and first == pytest.approx(-0.35) and first + bins * width > 0.9
    values = sorted([*(x / 100 for x in range(100)), 1e6])
    first, width, bins = edges(values)
    assert bins <= 60 and count(values, first, width, bins)[-1] >= 1
    assert sum(count(values, first, width, bins)) == 101
    for same in ([0.0], [3.0, 3.0], [-1e-9, 1e-9]):
        first, width, bins = edges(same)
        assert sum(count(same, first, width, bins)) == len(same) and width > 0
