"""`dpo-fast evaluate`: what it prints and writes, and mistakes. Its numbers: test_evaluate_model.py."""

import json
import math

import pytest

pytest.importorskip("transformers")

from rich.console import Console

from dpo_fast.cli.evaluate import evaluate, show, write
from dpo_fast.errors import UserError

FOUND = {
    "model": "runs/[mine]/checkpoint-4",
    "step": 4,
    "data": "pairs.jsonl",
    "examples": 1200,
    "kind": "pairs",
    "loss": ["sigmoid", "sft"],
    "reference": {"provider": "frozen", "path": "base"},
    "metrics": {
        "eval_loss": 0.5,
        "eval_rewards/margins": math.nan,
        "eval_perf/padding_fraction": 0.0,
    },
}


def test_the_table_says_what_was_compared_with_what(capsys):
    show(FOUND, Console(width=60))
    shown = capsys.readouterr().out
    assert "runs/[mine]/checkpoint-4, step 4, on 1,200 pairs" in shown
    assert "loss: sigmoid, sft; reference: frozen, base" in shown
    assert "rewards/margins" in shown and "nan" in shown and "perf/" not in shown
    alone = FOUND | {"step": None, "reference": {"provider": "none", "path": None}}
    show(alone, Console(width=60))
    assert "checkpoint-4, on 1,200 pairs" in capsys.readouterr().out


def test_the_file_is_json_whatever_the_numbers(tmp_path, capsys):
    write(FOUND, tmp_path / "found.json")
    content = json.loads((tmp_path / "found.json").read_text())
    assert content["metrics"]["eval_loss"] == 0.5 and content["step"] == 4
    assert content["metrics"]["eval_rewards/margins"] is None
    with pytest.raises(UserError, match="none/found.json cannot be written: .*--out"):
        write(FOUND, tmp_path / "none" / "found.json")


def test_mistakes_are_told_before_anything_is_loaded(tmp_path):
    with pytest.raises(UserError, match="to be evaluated on"):
        evaluate("org/model")
    with pytest.raises(UserError, match="no-such.jsonl"):
        evaluate("org/model", str(tmp_path / "no-such.jsonl"))
    with pytest.raises(UserError, match="model.path=.*no-such: no such folder"):
        evaluate(str(tmp_path / "no-such"), "org/data")
    with pytest.raises(UserError, match="loss.type=ipo compares with a reference"):
        evaluate("org/model", "org/data", ["loss.type=ipo"])
