"""`make gpu`, rehearsed: every step is reached, and a fault costs its own item alone."""

import contextlib
import io
import json

import pytest

from benchmarks.gpu import summary
from benchmarks.gpu.run import Lines, main
from benchmarks.gpu.steps import STEPS
from benchmarks.jsonl import read

pytestmark = [pytest.mark.processes, pytest.mark.slow]


def rehearse(folder, *options: str) -> int:
    """In this process, which only starts the others. Returns the exit code."""
    return main(["--rehearse", "--out", str(folder), *options])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A rehearsal of everything: its lines by step and item, and what it printed."""
    folder, printed = tmp_path_factory.mktemp("rehearsal"), io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert rehearse(folder, "--minutes", "20") == 0
    return {(x["step"], x["item"]): x for x in read(folder / "lines.jsonl")}, printed.getvalue()


def test_every_step_is_reached_and_right(whole):
    lines, _ = whole
    assert {step for step, _ in lines} == set(STEPS)
    wrong = {key: x["failed"] for key, x in lines.items() if "failed" in x and key[0] != "faults"}
    assert not wrong
    # A CPU has neither the card that csrc is for nor its profiler; everything else is measured.
    skipped = {step for (step, _), x in lines.items() if "skipped" in x}
    assert skipped <= {"csrc", "profile", "sanitize", "peers", "smoke"}
    checks = [x["checks"] for (step, _), x in lines.items() if step == "smoke" and "checks" in x]
    assert len(checks) >= 10 and all(c["ok"] for found in checks for c in found.values())
    assert all("x_bare" in x for (step, _), x in lines.items() if step == "rows")


def test_a_hang_a_crash_and_an_error_cost_their_own_line(whole):
    lines, printed = whole
    faults = {item: x for (step, item), x in lines.items() if step == "faults"}
    assert "killed" in faults["hangs"]["failed"]
    assert "SIGSEGV" in faults["crashes"]["failed"]
    assert faults["raises"]["failed"] == "ValueError: on purpose"
    assert "failed" not in faults["before"] and "failed" not in faults["after"]
    assert faults["before"]["pid"] != faults["after"]["pid"]
    assert "failed      faults: crashes" in printed


def test_the_table_has_ours_and_the_peers(whole):
    lines, printed = whole
    assert summary.table(list(lines.values())).splitlines()[-1] in printed
    for name in ("bare products", "dpo_fast triton", "trl", "materialised"):
        assert f"  {name} " in printed


def test_time_that_runs_out_leaves_lines_and_the_next_run_goes_on_behind_them(tmp_path):
    assert rehearse(tmp_path, "--only", "machine", "--minutes", "0") == 0
    assert [x["not_reached"] for x in read(tmp_path / "lines.jsonl")] == [True]
    with (tmp_path / "lines.jsonl").open("a") as file:
        file.write(json.dumps({"step": "machine", "item": "copy", "gbps": 1.0}) + "\n")
        file.write('{"step": "machine", "it')  # cut off in the writing
    assert rehearse(tmp_path, "--only", "machine", "--resume") == 0
    found = [x for x in read(tmp_path / "lines.jsonl") if "not_reached" not in x]
    assert [x["gbps"] for x in found if x["item"] == "copy"] == [1.0]
    assert {"versions", "copy"} < {x["item"] for x in found}


def test_a_step_that_is_not_there_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        rehearse(tmp_path, "--only", "smoke,rowz")
    told = capsys.readouterr().err
    assert ended.value.code == 2 and "rowz" in told and "rows" in told


def test_a_line_stays_when_the_next_is_cut_off(tmp_path):
    lines = Lines.at(tmp_path / "lines.jsonl", resume=False)
    lines.add("smoke", "a", {"x": 1})
    with lines.path.open("a") as file:
        file.write('{"half')
    again = Lines.at(lines.path, resume=True)
    again.add("smoke", "b", {"x": 2})
    assert [x["item"] for x in read(lines.path)] == ["a", "b"]
    assert again.done("smoke") == {"a", "b"}


def test_lines_that_are_not_there_are_named(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        summary.main([str(tmp_path / "lines.jsonl")])
    assert ended.value.code == 2 and "no such file: " in capsys.readouterr().err
