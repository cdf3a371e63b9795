"""`dpo-fast bench kernels`: rows with their evidence, no time without correctness, options."""

import dataclasses
import inspect

import pytest
import torch

import dpo_fast.ops
from benchmarks import run
from benchmarks.cli import Package
from benchmarks.kernels import checks, meters, results, rows
from benchmarks.kernels.case import Case, Contender, Outputs, head_inputs, logits_inputs
from benchmarks.kernels.linear_logp import OPERATION as HEAD
from benchmarks.kernels.operations import OPERATIONS
from benchmarks.kernels.options import parse
from benchmarks.machine import summary
from dpo_fast.errors import UserError

SMALL = "--ops linear_logp --shape 32,500 --tokens 64 --repeats 2 --no-memory --one-process"
OURS = ["--only", "dpo_fast torch*"]
ONE_CELL = ["--modes", "trainable", "--dtypes", "fp32"]


@pytest.fixture(autouse=True, scope="module")
def small_buffers():
    """No test needs the bandwidth of a large copy, or a cache emptied before every call."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(meters.FLUSH_BYTES, "cpu", 1 << 16)
        patch.setitem(meters.COPY_BYTES, "cpu", 1 << 16)
        yield


@pytest.fixture
def contenders(monkeypatch):
    """Replaces the contenders of linear_logp by the first of ours and those given."""

    def replace(*others):
        ours = next(c for c in HEAD.contenders if c.name == "dpo_fast torch")
        changed = dataclasses.replace(HEAD, contenders=(ours, *others))
        monkeypatch.setitem(OPERATIONS, "linear_logp", changed)
        return ours

    return replace


def run_small(tmp_path, *arguments) -> tuple[int, list[dict]]:
    path = tmp_path / "rows.csv"
    code = run.main(["kernels", *SMALL.split(), "--csv", str(path), *arguments])
    return code, results.COLUMNS.read(path)


def test_rows_have_every_column_and_sensible_values(tmp_path, capsys):
    """Their pictures are drawn by a command."""
    code, found = run_small(tmp_path, *OURS, "--dtypes", "fp32,bf16")
    assert code == 0
    for row in found:
        assert list(row) == list(results.COLUMNS.names)
        assert 0 < row["ms_p20"] <= row["ms_p50"] <= row["ms_p80"]
        assert row["device"].startswith("cpu") and row["torch"] == torch.__version__
        assert row["commit"] and row["date"] and row["capability"] and row["rounds"] == 2
        assert (row["T"], row["D"], row["V"]) == (64, 32, 500)
        if row["impl"] == results.COPY:
            assert row["gbps"] > 0
            continue
        assert row["flops"] == pytest.approx(row["products"] * 2 * 64 * 32 * 500, rel=1e-4)
        assert row["tflops"] == pytest.approx(row["flops"] / row["ms_p50"] / 1e9, rel=1e-4)
        assert row["x_of_bare_gemm"] > 0
        if row["impl"] != results.BARE:
            assert row["max_err"] < 1e-2 and row["err_logp"] < 1e-4
    products = {(row["impl"], row["mode"]): row["products"] for row in found if row["products"]}
    assert products["dpo_fast torch", "logps"] == products[results.BARE, "logps"] == 1
    assert products["dpo_fast torch", "frozen"] == products[results.BARE, "frozen"] == 2
    assert products["dpo_fast torch", "trainable"] == products[results.BARE, "trainable"] == 3
    assert products["dpo_fast torch, recompute", "trainable"] == 4
    assert 3 < products["dpo_fast torch, half budget", "trainable"] < 4
    printed = capsys.readouterr().out
    assert "ceilings of this run: bare products" in printed and "recompute 4G" in printed
    pytest.importorskip("matplotlib")
    drawn = ["--out", str(tmp_path), "--format", "png"]
    assert results.main([str(tmp_path / "rows.csv"), *drawn]) == 0
    assert (tmp_path / "bars_T64_D32_V500_cpu.png").stat().st_size > 1000


def test_a_ratio_is_of_the_products_of_the_rows_own_schedule():
    rounds = [{"logits": ms, "dH": 3.0, "dW": 5.0} for ms in (10.0, 12.0, 10.0)]
    cases = {mode: Case("linear_logp", mode, 8, 4, 16, "fp32", "cpu") for mode in HEAD.modes}

    def bare(mode, count):
        return summary(rows.bare(HEAD, cases[mode], count, rounds)).p50

    assert bare("logps", 1) == 10
    assert bare("frozen", 2) == 13
    assert bare("frozen", 3) == 23  # recomputes its logits for dH
    assert bare("trainable", 3) == 18
    assert bare("trainable", 3.5) == 23
    assert bare("trainable", 4) == 28


def wrong(name="wrong", factor=1.01):
    """Right log-probs, gradients off by a hundredth."""

    def build(case, inputs):
        right = next(c for c in HEAD.contenders if c.name == "materialised").build(case, inputs)

        def call():
            outputs = right()
            return outputs._replace(gradients=tuple(factor * g for g in outputs.gradients))

        return call

    return Contender(name, build, modes=("trainable",))


def test_a_wrong_contender_gets_no_time_and_fails_the_run(tmp_path, capsys, contenders):
    contenders(wrong(), wrong("slightly off", 1.00001))
    code, found = run_small(tmp_path, *ONE_CELL)
    assert code == 1
    by_name = {row["impl"]: row for row in found}
    bad = by_name["wrong"]
    assert bad["ms_p50"] == bad["x_of_bare_gemm"] == bad["tflops"] == ""
    assert bad["max_err"] == pytest.approx(0.01, rel=0.1) and bad["note"].startswith(
        "wrong: max_err"
    )
    assert by_name["slightly off"]["ms_p50"] and by_name["dpo_fast torch"]["ms_p50"]
    captured = capsys.readouterr()
    assert "FAILED: wrong / trainable" in captured.err and "above its gate" in captured.out


def failing(name, error, **options):
    def build(case, inputs):
        def call() -> Outputs:
            raise error

        return call

    return Contender(name, build, modes=("trainable",), **options)


def test_what_does_not_fit_or_breaks_has_a_row_that_says_so(tmp_path, contenders):
    contenders(
        failing("large", torch.OutOfMemoryError("no")),
        failing("large on a CPU", RuntimeError("DefaultCPUAllocator: can't allocate memory")),
        failing("broken peer", KeyError("x")),
        failing("ours, too large", torch.OutOfMemoryError("no"), ours=True),
    )
    code, found = run_small(tmp_path, *ONE_CELL)
    notes = {row["impl"]: row["note"] for row in found}
    assert code == 0
    assert notes["large"] == notes["large on a CPU"] == notes["ours, too large"] == "out of memory"
    assert notes["broken peer"] == "failed: KeyError: 'x'" and notes["dpo_fast torch"] == ""


def test_an_exception_in_ours_fails_the_run(tmp_path, capsys, contenders):
    contenders(failing("ours", KeyError("x"), ours=True))
    assert run_small(tmp_path, *ONE_CELL)[0] == 1
    assert "FAILED: ours / trainable" in capsys.readouterr().err


def test_who_is_missing_is_named_with_the_reason(tmp_path, capsys, contenders):
    package = Package("no-such-peer", "no_such_module", "pip install no-such-peer")
    peer = failing("peer", KeyError(), package=package)
    gpu = dataclasses.replace(peer, name="gpu peer", devices=("cuda",))
    contenders(peer, dataclasses.replace(peer, name="peer, exact"), gpu)
    assert run_small(tmp_path, "--modes", "trainable", "--dtypes", "fp32,bf16")[0] == 0
    lines = [line for line in capsys.readouterr().out.split("\n") if line.startswith("missing")]
    missing = "no-such-peer is not installed: pip install no-such-peer"
    assert lines == [
        f"missing: peer; peer, exact: {missing}",
        f"missing: gpu peer: needs a cuda device: it has no cpu kernels; and {missing}",
    ]
    with pytest.raises(UserError, match="no contender that was chosen can run here.*pip install"):
        run_small(tmp_path, "--only", "*peer")


@pytest.mark.processes
@pytest.mark.slow
def test_rows_go_to_a_file_and_from_it_to_pictures(tmp_path, capsys):
    """A curve of time and memory. Each memory is measured in a process of its own."""
    pytest.importorskip("matplotlib")
    only = ["--only", "dpo_fast torch, recompute", "--repeats", "1", "--one-process"]
    curve = ["--growth", "--shape", "16,200", "--tokens", "16,32,64", "--dtypes", "fp32"]
    assert run.main(["kernels", *only, *curve, "--plots", str(tmp_path)]) == 0
    path = tmp_path / "kernels.csv"
    found = results.COLUMNS.read(path)
    assert all(row["peak_mib"] >= 0 for row in found if row["impl"].startswith("dpo_fast"))
    again = tmp_path / "again.csv"
    results.COLUMNS.write(again, found)
    assert results.COLUMNS.read(again) == found
    picture = tmp_path / "growth_D16_V200_trainable_fp32_cpu.svg"
    first = picture.read_bytes()
    assert b"dpo_fast torch, recompute" in first
    results.draw([again], tmp_path)
    assert picture.read_bytes() == first  # the same rows, the same file
    found[-1] |= {"ms_p50": "", "peak_mib": "", "note": "out of memory"}
    results.COLUMNS.write(again, found)
    results.draw([again], tmp_path)
    assert "dpo_fast torch, recompute (no memory at 64)" in picture.read_text()


OPTIONS = {  # arguments, and what the message must say
    "--tokens 0": "--tokens 0: expected a whole number, 1 or more",
    "--tokens 8,x": "--tokens x: expected a whole number",
    "--repeats 0": "--repeats 0: expected",
    "--shape lama3": "--shape lama3: did you mean llama3?",
    "--shape 8,0": "--shape 8,0: choose llama3",
    "--modes frozn": "--modes frozn: did you mean frozen?",
    "--modes frozen --ops logits_logp": "--modes frozen: none of logits_logp has such a mode",
    "--dtypes fp8": "--dtypes fp8: choose from fp32, bf16, fp16",
    "--ops linear": "--ops linear: did you mean linear_logp?",
    "--only tlr": "--only 'tlr' matches no contender; did you mean 'trl'?",
    "--only trl --skip t*": "leave no contender",
    "--quick --tokens 8": "--quick chooses its own sizes: leave out --tokens",
    "--growth --ops preference": "--growth is about linear_logp, which --ops preference leaves out",
    "--device tpu": "--device tpu: choose cpu or cuda",
    "--minutes 0": "--minutes 0: expected a number greater than 0",
    "--timeout x": "--timeout x: expected a number greater than 0",
    "--one-process --minutes 1": "--one-process has nobody to end it after --minutes",
    "--one-process --timeout 1": "--one-process has nobody to wait with --timeout",
    "--jsonl README.md": "--jsonl README.md is there: add to it with --resume README.md",
    "--resume none.jsonl": "--resume none.jsonl: no such file; --jsonl none.jsonl begins one",
    "--resume README.md": "--resume README.md: no lines of bench kernels",
    "--resume a.jsonl --jsonl b.jsonl": "adds to its own file: leave out --jsonl b.jsonl",
    "--contenders no.such": "--contenders no.such: No module named 'no'",
    "--contenders json": "--contenders json: module 'json' has no attribute 'CONTENDERS'",
    "--no-such": "unrecognized arguments: --no-such; --help lists the options",
}


@pytest.mark.parametrize("arguments", OPTIONS)
def test_an_option_that_cannot_be_honoured_is_named(arguments):
    device = [] if "--device" in arguments else ["--device", "cpu"]
    with pytest.raises(UserError) as error:
        parse([*arguments.split(), *device])
    assert OPTIONS[arguments] in str(error.value)


def test_options_of_this_machine(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device cuda: this torch sees no GPU"):
        parse(["--device", "cuda"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="--plots x needs matplotlib: pip install matplotlib"):
        parse(["--plots", "x"])


def test_one_command_on_a_gpu_measures_points_and_the_curve(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    settings = parse([]).settings
    heads = [s for s in settings if s.op == "linear_logp"]
    points = {(s.T, s.D, s.V) for s in heads if not s.growth}
    assert points == {(8192, 4096, 128256), (16384, 896, 151936), (65536, 4096, 151936)}
    assert [s.T for s in heads if s.growth] == [1024 * 2**n for n in range(7)]
    assert {s.op for s in settings} == set(OPERATIONS) and {s.dtype for s in heads} == {"bf16"}


def test_who_stands_where():
    """Contenders that nobody asked for by name.

    On a GPU none whose fp32 products take seconds. On a CPU no peer that adds only minutes. Of two forms of
    a peer the one that this machine can run.
    """

    def names(device, mode, T, D, V):
        case = Case("linear_logp", mode, T, D, V, "bf16", device)
        return {c.name for c in HEAD.contenders if mode in c.modes and not c.spare(case)}

    large = names("cuda", "trainable", 65536, 4096, 151936)
    assert not any(name.startswith("dpo_fast torch") for name in large)
    assert {"dpo_fast triton, 1 GiB", "trl", "liger ce", "quack ce", "cce, exact"} <= large
    assert "torch linear_cross_entropy" in large
    assert "dpo_fast torch" in names("cuda", "frozen", 8192, 4096, 128256)
    on_cpu = names("cpu", "logps", 2048, 896, 32000)
    assert {"dpo_fast torch", "dpo_fast torch, extras", "materialised", "trl"} <= on_cpu
    assert not any("torch linear" in name or "liger dpo" in name for name in on_cpu)
    for mode in ("frozen", "trainable"):
        assert len([n for n in names("cpu", mode, 2048, 896, 32000) if "liger dpo" in n]) == 1


def test_a_spare_contender_runs_when_it_is_asked_for(tmp_path, capsys, contenders):
    ours = contenders()
    spare = dataclasses.replace(ours, name="spare", spare=lambda case: True)
    contenders(spare)
    code, found = run_small(tmp_path, *ONE_CELL)
    assert code == 0 and "spare" not in {row["impl"] for row in found}
    assert "left out in some mode unless --only has the name: spare" in capsys.readouterr().out
    code, found = run_small(tmp_path, *ONE_CELL, "--only", "spare")
    assert code == 0 and "spare" in {row["impl"] for row in found}
    with pytest.raises(UserError, match="Ask for these by name, without \\*: spare"):
        run_small(tmp_path, "--only", "spar*")


def test_every_operation_with_implementations_is_measured():
    operations = {
        name
        for name in dpo_fast.ops.__all__
        if inspect.isfunction(getattr(dpo_fast.ops, name))
        and "workspace_bytes" not in name
        and "implementation" in inspect.signature(getattr(dpo_fast.ops, name)).parameters
    } - {"plan", "warm_up"}  # sizes in, sizes or nothing out
    assert operations <= set(OPERATIONS)
    for name, operation in OPERATIONS.items():
        assert operation.name == name
        names = [contender.name for contender in operation.contenders]
        assert len(set(names)) == len(names)


@pytest.mark.parametrize("make", ["head", "logits"])
def test_truth_in_chunks_is_autograd_through_whole_logits(monkeypatch, make):
    monkeypatch.setitem(checks.CHUNK_BYTES, "cpu", 8 * 50 * 3)  # three tokens at a time
    if make == "head":
        inputs = head_inputs(10, 8, 50, torch.float32)
        found, leaves = checks.HeadTruth(inputs), (inputs.hidden, inputs.weight)
        logits = inputs.hidden.double() @ inputs.weight.double().t()
    else:
        inputs = logits_inputs(10, 50, torch.float32)
        found, leaves = checks.LogitsTruth(inputs), (inputs.logits,)
        logits = inputs.logits.double()
    logp = torch.log_softmax(logits, -1).gather(1, inputs.targets[:, None]).squeeze(1)
    torch.testing.assert_close(found.logp, logp.detach())
    names = ("hidden", "weight") if make == "head" else ("logits",)
    gradients = found.gradients("token", inputs.slopes, names)
    for name, expected in zip(names, torch.autograd.grad(logp, leaves, inputs.slopes.double())):
        torch.testing.assert_close(gradients[name].float(), expected)


def test_gates_let_no_nan_through():
    logp, gradient = torch.zeros(4).sub(1.0), torch.ones(2, 2)
    contender = Contender("x", lambda case, inputs: None)
    good = checks.compare(Outputs(logp.clone(), (gradient.clone(),)), logp, [gradient])
    assert good.above_gate(contender, "bf16") is None
    for values, found in ((logp * torch.nan, gradient), (logp, gradient * torch.nan)):
        errors = checks.compare(Outputs(values, (found,)), logp, [gradient])
        assert "above its gate" in errors.above_gate(contender, "bf16")


def test_rounds_go_there_and_back():
    calls = []
    functions = {name: lambda number, name=name: calls.append((name, number)) for name in "ab"}
    series = meters.interleave(functions, "cpu", rounds=3)
    assert calls == [("a", 0), ("b", 0), ("b", 1), ("a", 1), ("a", 2), ("b", 2)]
    assert all(len(series[name]) == 3 for name in "ab")
    assert summary([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == (2.0, 3.5, 5.0)


def test_a_printed_row_stands_under_its_titles():
    values = {
        "ms_p50": 123.456,
        "ms_p20": 9.87654,
        "ms_p80": 200.0,
        "x_of_bare_gemm": 1.239,
        "peak_mib": 10.6,
        "max_err": 1.26e-7,
    }
    case = Case("linear_logp", "trainable", 8, 4, 16, "fp32", "cpu")
    found = [
        rows.row(case, "ours", schedule="mixed", products=3.5, **values),
        rows.row(case, "large", products=3.0, note="out of memory"),
    ]
    header, ours, large = results.block(found).split("\n")
    cells = {
        "schedule": "mixed 3.5G",
        "ms p50": "123.5",
        "p20": "9.877",
        "p80": "200.0",
        "x bare": "1.24",
        "GB/s": "",
        "peak MiB": "11",
        "max_err": "1.3e-07",
    }
    assert len(header) == len(ours)
    for title, cell in cells.items():
        start = header.index(title)
        end = start + (14 if title == "schedule" else len(title))
        assert ours[:end].rstrip().endswith(cell) if cell else not ours[start:end].strip()
        assert title == "schedule" or ours[end:][:1] in ("", " ")
    assert large.split("  ")[-1] == "out of memory" and "least 3G" in large


def test_memory_on_a_gpu_is_the_allocators(monkeypatch):
    """The peak of a call, less what was there before it and less its outputs."""
    seen = []
    counts = {"memory_allocated": 1 << 20, "max_memory_allocated": 4 << 20}
    for name in ("empty_cache", "reset_peak_memory_stats", "synchronize", *counts):
        call = lambda name=name: (seen.append(name), counts.get(name))[1]  # noqa: E731
        monkeypatch.setattr(torch.cuda, name, call)

    def function():
        seen.append("run")
        return Outputs(torch.zeros(1 << 18))

    assert meters.peak_mib(function, "cuda") == 2
    others = [name for name in seen if name != "empty_cache"]
    before = ["memory_allocated", "reset_peak_memory_stats"]
    after = ["synchronize", "max_memory_allocated"]
    assert others == [*before, "run", *after]
    assert seen[0] == "empty_cache"
