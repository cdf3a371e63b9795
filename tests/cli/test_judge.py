"""`dpo-fast judge` at the command line."""

from __future__ import annotations

import json
import sys

import pytest

from dpo_fast.cli import app
from tests.support.judging import read_rows, write_rows

LENGTHS = ["sh", "-c", "while read -r line; do echo ${#line}; done"]
ROWS = [{"prompt": "q?", "completions": ["a b", "c d e"], "id": index} for index in range(3)]


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Runs `dpo-fast judge` on a file of this tree; gives exit code, standard output and error."""

    def leave(code):
        raise SystemExit(code)

    def command(tree: dict, *arguments: str) -> tuple[int, str, str]:
        file = tmp_path / "rounds.yaml"
        file.write_text(json.dumps({"output_dir": str(tmp_path), "model": {"path": "m"}} | tree))
        monkeypatch.setattr(app, "_leave", leave)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.setattr(sys, "argv", ["dpo-fast", "judge", str(file), *arguments])
        with pytest.raises(SystemExit) as ended:
            app.main()
        out, err = capsys.readouterr()
        return ended.value.code or 0, out, err

    write_rows(tmp_path / "samples.jsonl", ROWS)
    return command


def test_it_shows_counts_and_names_the_pairs(run, tmp_path):
    judge = {"type": "command", "command": LENGTHS}
    code, out, err = run({"judge": judge}, "--quiet")
    assert code == 0 and not err
    assert f"pairs: {tmp_path}/pairs.jsonl" in out and "prompts with pairs" in out
    assert "the judge prefers longer answers" in out
    assert [row["chosen"] for row in read_rows(tmp_path / "pairs.jsonl")] == ["c d e"] * 3
    code, out, err = run({"judge": judge})
    assert code == 0 and "scores.jsonl is complete" in err


@pytest.mark.parametrize(
    ("tree", "arguments", "said"),
    [
        ({}, [], "there is no section judge; add one, such as judge: {type: rule"),
        ({"judge": {"type": "rule"}}, [], "judge.type=rule needs judge.function"),
        (
            {"judge": {"type": "command", "comand": "x"}},
            [],
            "unknown key judge.comand; did you mean",
        ),
        ({"jugde": {}}, [], "unknown key jugde; did you mean judge?"),
        ({"judge": {"type": "command", "command": "x"}}, ["pairs.margin=-1"], "pairs.margin=-1"),
        (
            {"judge": {"type": "command", "command": "/no/such/program"}},
            [],
            "/no/such/program cannot be started",
        ),
        ({"judge": {"type": "reward_model", "path": "/no/model"}}, [], "judge.path=/no/model"),
        (
            {"judge": {"type": "reward_model", "path": "no-such-org/no-model"}},
            [],
            "judge.path=no-such-org/no-model: the model cannot be loaded",
        ),
        (
            {"judge": {"type": "command", "command": "cat", "samples": "/no/rows.jsonl"}},
            [],
            "/no/rows.jsonl is not there",
        ),
    ],
)
def test_mistakes_are_one_paragraph(run, tmp_path, tree, arguments, said):
    code, out, err = run(tree, *arguments)
    assert code == 2 and said in err and "Traceback" not in err
    assert not (tmp_path / "scores.jsonl").exists()
