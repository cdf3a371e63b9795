"""The command line of the benchmarks, and the shape of their folder."""

import importlib
import re
from pathlib import Path

import pytest
import torch

import dpo_fast
from benchmarks import machine, plots, results, run
from dpo_fast.errors import UserError
from dpo_fast.ops import cpu

BENCHMARKS = Path(run.__file__).parent


def test_what_is_measured_has_a_name():
    with pytest.raises(UserError, match="kernel to measure: choose kernels or train"):
        run.main(["kernel"])
    with pytest.raises(UserError, match="nothing to measure"):
        run.main([])


def test_the_benchmarks_know_nothing_of_each_other():
    """And neither do the files that they share: `run` imports by name what was asked for."""
    for folder, strangers in (("kernels", "train"), ("train", "kernels"), (".", "kernels|train")):
        files = list((BENCHMARKS / folder).glob("*.py"))
        assert len(files) > 5
        for file in files:
            found = re.findall(
                rf"^\s*from benchmarks(?:\.| import )(?:{strangers})\b.*", file.read_text(), re.M
            )
            assert not found, (file, found)


@pytest.mark.parametrize("folder", ["kernels", "train"])
def test_a_benchmark_lists_its_files(folder):
    listed = re.findall(r"\w+\.py", (BENCHMARKS / folder / "__init__.py").read_text())
    there = {file.name for file in (BENCHMARKS / folder).glob("*.py")} - {"__init__.py"}
    assert len(listed) == len(there) and set(listed) == there


def test_files_in_the_readme_exist():
    named = re.findall(r"`([\w./]+\.(?:py|csv))`", (BENCHMARKS / "README.md").read_text())
    assert len(named) > 8
    for name in named:
        here = [BENCHMARKS / name, BENCHMARKS / "kernels" / name]
        assert any(path.exists() for path in here), name


def test_the_command_needs_a_checkout(monkeypatch, tmp_path):
    pytest.importorskip("typer")
    from dpo_fast.cli import bench

    assert (bench.checkout() / "benchmarks" / "run.py").is_file()
    monkeypatch.setattr(dpo_fast, "__file__", str(tmp_path / "site" / "dpo_fast" / "__init__.py"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="bench needs benchmarks/, which is not in the wheel"):
        bench.checkout()


@pytest.mark.parametrize("arguments", ["kernels --tokens 0", "train --rounds 0"])
def test_the_command_passes_options_on(monkeypatch, capsys, arguments):
    pytest.importorskip("typer")
    from dpo_fast.cli import app

    monkeypatch.setattr("sys.argv", ["dpo-fast", "bench", *arguments.split()])
    monkeypatch.setattr(app, "_leave", lambda code: (_ for _ in ()).throw(SystemExit(code)))
    with pytest.raises(SystemExit) as ended:
        app.main()
    assert ended.value.code == 2
    assert (
        f"dpo-fast: {arguments.split(' ', 1)[1]}: expected a whole number"
        in capsys.readouterr().err
    )


def test_pictures_are_drawn_again_by_a_command(monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    from benchmarks.train import results as train

    monkeypatch.setattr(plots, "RESULTS", tmp_path)
    assert train.main([]) == 2
    assert f"plot: no train*.csv in {tmp_path}: run `dpo-fast bench" in capsys.readouterr().err
    committed = BENCHMARKS / "results" / "train_cpu.csv"
    (tmp_path / committed.name).write_bytes(committed.read_bytes())
    assert train.main(["--out", str(tmp_path / "drawn")]) == 0
    (picture,) = (tmp_path / "drawn").glob("pairs_*.svg")
    drawn = picture.read_text()
    assert all(f">{row['impl']}<" in drawn for row in train.COLUMNS.read(committed))
    assert str(picture) in capsys.readouterr().out


def test_a_failure_makes_the_exit_code(capsys):
    assert results.print_failures([]) == 0
    assert results.print_failures(["one: wrong"]) == 1
    assert capsys.readouterr().err == "FAILED: one: wrong\n"


def test_a_file_with_fewer_columns_can_be_read(tmp_path):
    """Columns come with time. Those of a file that is older are empty."""
    columns = results.Columns.of("impl capability ms", "ms")
    (tmp_path / "old.csv").write_text("impl,ms\nours,1.5\n")
    assert columns.read(tmp_path / "old.csv") == [{"impl": "ours", "capability": "", "ms": 1.5}]
    for name in ("kernels", "train"):
        rows = results_of(name).COLUMNS.read(BENCHMARKS / "results" / f"{name}_cpu.csv")
        assert rows and all(set(row) == set(results_of(name).COLUMNS.names) for row in rows)


def results_of(benchmark: str):
    return importlib.import_module(f"benchmarks.{benchmark}.results")


def test_the_instruction_set_is_named(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(cpu, "cpu_features", lambda: {"avx2", "avx512_bf16", "sse"})
    monkeypatch.setattr(cpu, "_limit", lambda: None)
    assert machine.capability("cpu") == "avx512 avx512_bf16"
    monkeypatch.setattr(cpu, "_limit", lambda: "ONEDNN_MAX_CPU_ISA=AVX2")
    assert machine.capability("cpu") == "avx512 avx512_bf16 ONEDNN_MAX_CPU_ISA=AVX2"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert machine.capability("cuda") == "sm_90"
