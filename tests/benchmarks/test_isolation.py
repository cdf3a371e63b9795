"""`bench kernels` in rented minutes: whoever takes a process down loses its own row, and lines stay."""

import json

import pytest

from benchmarks import jsonl, run
from benchmarks.cli import Selection
from benchmarks.kernels import lines, measure, meters, operations, results, rows
from benchmarks.kernels.case import Setting
from benchmarks.kernels.isolation import Course, Isolated
from benchmarks.kernels.operations import OPERATIONS
from benchmarks.workers import Lost

FAULTY = "tests.support.workers.bench_contenders"
SMALL = "--ops linear_logp --shape 32,500 --tokens 64 --repeats 2 --modes trainable --dtypes fp32"
OURS = "dpo_fast torch"


@pytest.fixture(autouse=True)
def table():
    """Contenders that a test adds are gone after it."""
    before = dict(OPERATIONS)
    yield
    OPERATIONS.update(before)
    operations._added.clear()


def bench(tmp_path, *arguments: str) -> tuple[int, dict[str, dict]]:
    """Exit code, and the rows by contender."""
    path = tmp_path / "rows.csv"
    common = [*SMALL.split(), "--contenders", FAULTY, "--csv", str(path)]
    code = run.main(["kernels", *common, *arguments])
    return code, {row["impl"]: row for row in results.COLUMNS.read(path)} if path.exists() else {}


def only(*names: str) -> list[str]:
    return [word for name in names for word in ("--only", name)]


@pytest.mark.processes
@pytest.mark.slow
def test_who_takes_its_process_down_loses_its_own_row(tmp_path, capsys):
    """By a signal, a hang, a failed device, and a signal in the middle of the times."""
    file = tmp_path / "lines.jsonl"
    names = (OURS, "fine", "crashes", "hangs", "breaks the device", "crashes later", "fine too")
    options = ["--no-memory", "--timeout", "6", "--jsonl", str(file)]
    code, found = bench(tmp_path, *only(*names), *options)
    killed = "no answer in 6 seconds; killed"
    assert {name: found[name]["note"] for name in names} == {
        OURS: "",
        "fine": "",
        "crashes": "its process ended with SIGSEGV",
        "hangs": killed,
        "breaks the device": "failed: RuntimeError: CUDA error: an illegal memory access was encountered",
        "crashes later": "its process ended with SIGSEGV",
        "fine too": "",
    }
    for name in (OURS, "fine", "fine too", results.BARE):
        assert found[name]["ms_p50"] > 0 and found[name]["rounds"] == 2
    assert not any(found[name]["ms_p50"] for name in names if found[name]["note"])
    assert found["crashes later"]["max_err"] < 1e-4  # it was right as long as it lived
    # What hangs passes for ours here, so that it fails the run; the others do not.
    failed = [x for x in capsys.readouterr().err.splitlines() if x.startswith("FAILED")]
    assert code == 1 and len(failed) == 1 and "hangs / trainable" in failed[0]
    assert failed[0].endswith(killed)
    # The rows are in the lines, and each contender was checked once.
    kept = jsonl.read(file)
    assert {row["impl"]: row["note"] for row in rows.rows_of(kept)} == {
        name: row["note"] for name, row in found.items()
    }


@pytest.mark.processes
@pytest.mark.slow
def test_a_run_goes_on_behind_its_lines(tmp_path, capsys):
    """What has its times or its note is left out, what was cut off in the writing is measured again."""
    file, kept = tmp_path / "lines.jsonl", ["--no-memory", "--timeout", "20"]
    code, first = bench(tmp_path, *only(OURS, "crashes"), *kept, "--jsonl", str(file))
    assert code == 0 and set(first) == {"copy", "bare products", OURS, "crashes"}
    again = only(OURS, "crashes", "fine")
    code, second = bench(tmp_path, *again, *kept[1:], "--resume", str(file))
    assert code == 0 and set(second) == {*first, "fine"} and second["fine"]["peak_mib"] >= 0
    assert second[OURS] == first[OURS] and second["crashes"] == first["crashes"]
    assert "2 were measured before" in capsys.readouterr().out
    # The last round is cut off: one of two is too few for a time that stands.
    text = file.read_bytes()
    file.write_bytes(text[: text.rindex(b'"fine / trainable"')])
    code, third = bench(tmp_path, *again, *kept, "--resume", str(file))
    assert code == 0 and third["fine"]["rounds"] == 2 and third[OURS] == first[OURS]
    assert third["fine"]["ms_p50"] != second["fine"]["ms_p50"]
    assert len(file.read_text().splitlines()) == len(jsonl.read(file)) + 1
    pytest.importorskip("matplotlib")
    assert results.main([str(file), "--out", str(tmp_path / "out"), "--format", "png"]) == 0
    table = results.COLUMNS.read(tmp_path / "out" / "lines.csv")
    assert {row["impl"]: row for row in table} == third
    assert (tmp_path / "out" / "bars_T64_D32_V500_cpu.png").stat().st_size > 1000


@pytest.mark.processes
@pytest.mark.slow
def test_minutes_end_a_run_and_what_was_not_reached_is_named(tmp_path, capsys, monkeypatch):
    """They end in a hang, which has no note: it may have been slow. What was known before it stays."""
    file, over = tmp_path / "lines.jsonl", []
    see = lines.Watch.see

    def ends_with_the_hang(watch, line):
        see(watch, line)
        if watch.impl == "hangs":
            over.append(True)

    monkeypatch.setattr(lines.Watch, "see", ends_with_the_hang)
    monkeypatch.setattr(Isolated, "_left", lambda self: 0.0 if over else 3600.0)
    options = ["--no-memory", "--tokens", "64,32", "--minutes", "60", "--jsonl", str(file)]
    code, found = bench(tmp_path, *only(OURS, "hangs"), *options)
    assert code == 0 and found[OURS]["note"] == rows.CUT and found[OURS]["max_err"] < 1e-4
    said = capsys.readouterr().out
    assert "not measured, the 60 minutes are over" in said
    assert "hangs / trainable, linear_logp T=64" in said and "linear_logp T=32" in said
    assert [x["line"] for x in jsonl.read(file)] == ["setting", "check"]


def test_no_minutes_measure_nothing(tmp_path, capsys):
    code, found = bench(tmp_path, *only(OURS), "--minutes", "1e-9")
    assert code == 0 and not found
    assert "not measured, the 1e-09 minutes are over: linear_logp T=64" in capsys.readouterr().out


def test_a_setting_leaves_time_for_times(monkeypatch):
    """Checks and memory that are not begun in their share of it are left out; the least rounds are not."""
    monkeypatch.setattr(measure.time, "monotonic", iter(float(10 * n) for n in range(100)).__next__)
    monkeypatch.setitem(meters.FLUSH_BYTES, "cpu", 1 << 16)
    monkeypatch.setitem(meters.COPY_BYTES, "cpu", 1 << 16)
    told = []
    names = ("dpo_fast torch", "dpo_fast torch, recompute", "materialised")
    lineup = measure.Lineup(Selection(names), 2, seconds=30.0, tell=told.append)
    # A look at the clock takes ten seconds here: the second is past 60 % of 30, with one checked.
    outcome = measure.measure(SETTING, OPERATIONS["linear_logp"], lineup)
    assert [x["impl"] for x in told if x["line"] == "check"] == ["dpo_fast torch"]
    assert not any(x["line"] == "memory" for x in told)
    assert sum(x["line"] == "round" for x in told) == 2
    assert "materialised / trainable" in "; ".join(outcome.unreached)


SETTING = Setting("linear_logp", 64, 32, 500, "fp32", "cpu", ("logps", "trainable"))
TIMES = {"logits": 2.0, "dH": 1.0, "dW": 1.0, "copy": 5.0}


def check(name: str, mode: str, products: float = 3.0) -> dict:
    errors = {"max_err": 1e-7, "err_logp": 1e-7, "err_sequence": 1e-7}
    rest = {"schedule": "", "products": products, "package": ""}
    return lines.about("check", name, mode, **errors, **rest)


def opening(*who: tuple[str, str], least: int = 2) -> dict:
    return lines.opening(SETTING, list(who), least)


def times(**ms: float) -> dict:
    return {"line": "round", "ms": TIMES | {f"{k} / trainable": v for k, v in ms.items()}}


def test_rows_come_of_what_is_known_so_far():
    who = [("a", "trainable"), ("b", "trainable"), ("c", "trainable")]
    told = [opening(*who), check("b", "trainable"), check("a", "trainable")]
    found = rows.rows_of(told)
    assert [(row["impl"], row["note"]) for row in found] == [("b", rows.CUT), ("a", rows.CUT)]
    told.append(times(a=8.0, b=4.0))
    found = {row["impl"]: row for row in rows.rows_of(told) if row["mode"] != "logps"}
    assert found["a"]["x_of_bare_gemm"] == 2 and found["b"]["x_of_bare_gemm"] == 1
    assert found["a"]["rounds"] == found["bare products"]["rounds"] == 1
    assert rows.done(told) == {}  # two rounds make a time final
    assert rows.Outcome.of(told).unreached == [f"c / trainable, {SETTING.case('trainable')}"]
    told += [times(a=8.0, b=4.0), lines.about("note", "b", "trainable", note="broke", failed=True)]
    found = {row["impl"]: row for row in rows.rows_of(told)}
    assert found["b"]["note"] == "broke" and found["b"]["ms_p50"] == ""
    names = [name for _, name in rows.done(told)[SETTING.sizes]]
    assert set(names) == {("a", "trainable"), ("b", "trainable")}
    assert len(rows.Outcome.of(told).failures) == 1


def test_the_later_row_stands_unless_it_was_cut_short():
    a, b = ("a", "trainable"), ("b", "trainable")
    first = [opening(a, b), check(*a), check(*b), times(a=8.0, b=8.0), times(a=8.0, b=8.0)]
    second = [opening(a, b), check(*a), check(*b)]
    by_name = lambda told: {row["impl"]: row["ms_p50"] for row in rows.rows_of(told)}  # noqa: E731
    assert by_name(first + second)["a"] == 8
    assert rows.Outcome.of(first + second).unreached == []
    assert by_name(first + second + [times(a=6.0, b=7.0)])["a"] == 6
    lost = [opening(a, b), {"line": "lost", "phase": "inputs", "how": "out of memory"}]
    assert "inputs: out of memory" in rows.Outcome.of(lost).failures[0]
    assert rows.Outcome.of(lost + first).failures == []


def course(*told: dict) -> tuple[Course, list[dict]]:
    """A setting that was lost behind these lines, and where new lines go."""
    new = []
    made = Course(SETTING, measure.Lineup(tell=new.append), done=[])
    for line in told:
        made.tell(line)
    new.clear()
    return made, new


def phase(name: str, impl: str = "", mode: str = "") -> dict:
    return lines.about("phase", impl, mode, phase=name)


def test_whoever_memory_ended_for_does_not_fail_the_run():
    lost, new = course(check(OURS, "trainable"), phase("memory", OURS, "trainable"))
    assert lost.goes_on(Lost("its process ended with SIGKILL", by="SIGKILL"))
    assert new == [lines.about("note", OURS, "trainable", note="out of memory", failed=False)]
    request = json.loads(lost.request(None))
    assert request["without"] == [[OURS, "trainable"]] and request["known"] == []
    lost, new = course(phase("memory", OURS, "trainable"))
    assert lost.goes_on(Lost("its process ended with SIGSEGV", by="SIGSEGV")) and new[0]["failed"]


def test_nobody_is_blamed_for_what_is_nobodys():
    """Inputs that do not fit end the setting. Times that end it are looked at once more, call by call."""
    lost, new = course(phase("inputs"))
    assert not lost.goes_on(Lost("out of memory"))
    assert new == [{"line": "lost", "phase": "inputs", "how": "out of memory"}]
    lost, new = course(check("trl", "trainable"), phase("times"))
    assert lost.goes_on(Lost("its process ended with SIGSEGV")) and lost.careful and not new
    assert json.loads(lost.request(None))["known"] == [check("trl", "trainable")]
    assert not lost.goes_on(Lost("its process ended with SIGSEGV"))
    assert [line["line"] for line in new] == ["lost"]
    lost, new = course(phase("times"))
    lost.careful = True
    lost.tell(phase("times", "trl", "trainable"))
    assert lost.goes_on(Lost("its process ended with SIGSEGV")) and not lost.careful
    assert new[-1]["impl"] == "trl" and not new[-1]["failed"]


def test_a_line_that_was_cut_off_costs_itself_alone(tmp_path):
    file = tmp_path / "lines.jsonl"
    assert jsonl.begin(file) == []
    jsonl.add(file, {"a": 1})
    with file.open("a") as stream:
        stream.write(json.dumps({"b": 2})[:5])
    assert jsonl.begin(file, keep=True) == [{"a": 1}]
    jsonl.add(file, {"c": 3})
    assert jsonl.read(file) == [{"a": 1}, {"c": 3}]
    assert jsonl.begin(file) == [] and not file.exists()
