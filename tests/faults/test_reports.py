"""A report of damaged or hostile files of a run: a page without foreign HTML, or one message."""

import json
import random
import resource
import shutil

import pytest
import yaml

from dpo_fast.data.report import DataReport
from dpo_fast.data.verdicts import Tally
from dpo_fast.errors import UserError
from dpo_fast.report import write_report
from tests.support import malformed
from tests.support.faults import SLOW

HTML = "</script></title><img src=x onerror=alert(1)>"


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    lines = [
        {"step": step, "loss": 0.6, "rewards/accuracies": 0.5, "epoch": 1} for step in range(9)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = {
        "model": {"path": HTML},
        "log": {"run_name": HTML},
        "loss": {"type": ["sigmoid"], "beta": 0.1},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    bad = Tally({HTML: 3}, {HTML: [(HTML, HTML)]})
    report = DataReport([HTML], 9, 6, bad=bad, lengths={"prompt": {"p5": 1}}, tokens={"prompt": 3})
    report.ignored_columns = [HTML]
    (folder / "data-report.json").write_text(report.to_json())
    samples = [{"prompt": HTML, "before": HTML, "after": None, "right": True}]
    (folder / "samples.json").write_text(json.dumps(samples))
    return folder


def page_of(folder) -> str:
    """The page; empty where a message says what is wrong."""
    try:
        return write_report(folder).read_text(encoding="utf-8")
    except UserError as error:
        assert str(folder) in str(error) and len(str(error)) < 2000
        return ""


def test_html_is_text(run):
    page = page_of(run)
    assert "<img" not in page and page.count("<script") == 1 and page.count("&lt;img") > 6


def damaged(draw: random.Random, content: str) -> bytes:
    """A file with values of other types in it, or with altered bytes."""
    if draw.random() < 0.4:
        return malformed.altered(draw, content.encode())
    return malformed.other_value(draw, content)


def check(run, tmp_path, count: int, seed: int) -> int:
    """The number of pages that were written, out of so many runs with a damaged file."""
    written = 0
    for index in range(count):
        draw = random.Random(seed * 1_000_003 + index)
        folder = tmp_path / "damaged"
        shutil.copytree(run, folder)
        file = draw.choice(sorted(folder.iterdir()))
        file.write_bytes(damaged(draw, file.read_text()))
        page = page_of(folder)
        assert "<img" not in page and page.count("<script") <= 1, index
        written += bool(page)
        shutil.rmtree(folder)
    return written


def test_a_sample_of_damaged_runs(run, tmp_path):
    assert 20 < check(run, tmp_path, 120, seed=1) < 120


@pytest.mark.slow
@SLOW
def test_damaged_runs_by_the_thousand(run, tmp_path):
    print("pages written:", check(run, tmp_path, 2000, seed=2), "of 2000")


def test_a_full_disk(run):
    old = page_of(run)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(UserError, match="report.html cannot be written: "):
            write_report(run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (run / "report.html").read_text() == old
