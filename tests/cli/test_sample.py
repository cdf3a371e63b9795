"""`dpo-fast sample` as a command: ranks, kills, signals, and a server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from dpo_fast.rounds.config import RoundsConfig
from dpo_fast.rounds.sample import sole_sample
from dpo_fast.training.config import build
from tests.support.judging import read_rows
from tests.support.models import write_model
from tests.support.paths import ENVIRONMENT
from tests.support.server import MODEL, serving

COMMAND = [sys.executable, "-m", "dpo_fast", "sample"]


def write(folder: Path, out: str, count: int = 40, **sample) -> Path:
    rows = [{"prompt": f"{i}: {7 * i} or {3 * i}? " + "so " * (i % 4)} for i in range(count)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    section = {"prompts": str(folder / "prompts.jsonl"), "max_new_tokens": 24, "num_generations": 2}
    tree = {
        "output_dir": str(folder / out),
        "model": {"path": str(folder / "model"), "dtype": "fp32"},
        "data": {"max_length": 96, "cache_dir": str(folder / "cache")},
        "sample": section | {"engine": {"batch_size": 2}} | sample,
    }
    file = folder / f"{out}.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


def run(*words, expect=0) -> str:
    done = subprocess.run(
        [*COMMAND, *map(str, words)], env=ENVIRONMENT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == expect, done.stderr[-4000:]
    return done.stdout + done.stderr


def contents(folder: Path) -> dict[str, bytes]:
    return {
        file.name: file.read_bytes() for file in folder.glob("samples*") if file.suffix != ".json"
    }


def lines(folder: Path) -> int:
    files = (folder / ".samples.partial").glob("completions-*.jsonl")
    return sum(file.read_bytes().count(b"\n") for file in files)


@pytest.mark.processes
@pytest.mark.slow
def test_killed_on_two_ranks_one_rank_goes_on_and_ends_the_same(tmp_path, capsys):
    write_model(tmp_path / "model")
    tree = yaml.safe_load(write(tmp_path, "whole").read_text())
    sole_sample(build(RoundsConfig, tree, "case"))
    file = write(tmp_path, "killed")
    process = subprocess.Popen(
        [*COMMAND, str(file), "--nproc", "2"], env=ENVIRONMENT, start_new_session=True
    )
    until = time.monotonic() + 200
    while lines(tmp_path / "killed") < 6:
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = lines(tmp_path / "killed")
    assert 6 <= done < 40
    sole_sample(build(RoundsConfig, yaml.safe_load(file.read_text()), "case"))
    assert f"{done} of 40 batches are there already" in " ".join(capsys.readouterr().err.split())
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert len(contents(tmp_path / "whole")) == 2


@pytest.mark.processes
def test_a_signal_ends_it_with_how_to_go_on_and_a_server_completes_it(tmp_path):
    pytest.importorskip("openai")
    write_model(tmp_path / "model")
    with serving() as server:
        engine = {"type": "openai", "url": server.url, "model": MODEL, "concurrency": 1}
        file = write(tmp_path, "out", 6, engine=engine)
        server.answer = lambda body: time.sleep(0.1) or f"text {body['seed']}"
        process = subprocess.Popen(
            [*COMMAND, str(file)], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
        )
        until = time.monotonic() + 200
        while lines(tmp_path / "out") < 3:
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=60)[1]
        assert process.returncode == 130, said
        assert (
            "interrupted by SIGTERM; what is done is kept: the same command goes on after it"
            in said
        )
        before = len(server.asked)
        said = run(file, "--quiet")
        assert 12 - before <= len(server.asked) - before < 12
        assert said.splitlines() == [f"samples: {tmp_path / 'out' / 'samples.jsonl'}"]
    rows = read_rows(tmp_path / "out" / "samples.jsonl")
    assert len({text for row in rows for text in row["completions"]}) == 12
    assert "logps" not in rows[0]


def test_mistakes_are_told_before_anything_is_loaded(tmp_path, monkeypatch, capsys):
    from dpo_fast.cli import app

    codes = []
    monkeypatch.setattr(app, "_leave", codes.append)

    def said(*words) -> str:
        monkeypatch.setattr(sys, "argv", ["dpo-fast", "sample", *map(str, words)])
        app.main()
        return capsys.readouterr().err

    file = write(tmp_path, "out")
    assert "unknown key sample.num_generation; did you mean" in said(
        file, "sample.num_generation=3"
    )
    assert "no such configuration file" in said(tmp_path / "none.yaml")
    assert "the file has no section sample" in said(file, "sample=null")
    assert "model.path" in said(file)
    assert codes == [2] * 4
