"""The hook for lm-eval: what it is told of a model, and what is said without it."""

import json
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest

pytest.importorskip("deepspeed")

from typer.testing import CliRunner

from dpo_fast.cli import app
from dpo_fast.errors import UserError
from dpo_fast.training.harness import evaluate_tasks
from tests.support.adapters import write_adapter
from tests.support.models import write_model
from tests.support.tokenizers import CHATML, byte_tokenizer


@pytest.fixture
def asked(monkeypatch):
    """What the package was asked. It stands in: lm-eval needs the hub for its tasks."""
    calls = []

    def simple_evaluate(model, model_args, tasks, batch_size, limit, apply_chat_template):
        calls.append((model, model_args, tasks, limit, apply_chat_template))
        if "no-such-task" in tasks:
            raise ValueError("Tasks not found: no-such-task")
        values = {"alias": "x", "acc,none": 0.5, "acc_stderr,none": 0.1}
        return {"results": dict.fromkeys(tasks, values)}

    module = ModuleType("lm_eval")
    module.__spec__ = ModuleSpec("lm_eval", None)
    module.simple_evaluate = simple_evaluate
    monkeypatch.setitem(sys.modules, "lm_eval", module)
    return calls


def test_it_is_told_where_the_model_lies(tmp_path, asked):
    folder = str(write_model(tmp_path / "run/final"))
    expected = {"ifeval": {"acc,none": 0.5, "acc_stderr,none": 0.1}}
    assert evaluate_tasks(str(tmp_path / "run"), ["ifeval"], 3) == expected
    assert asked[-1] == ("hf", f"pretrained={folder},dtype=auto", ["ifeval"], 3, False)
    byte_tokenizer(template=CHATML).save_pretrained(folder)
    evaluate_tasks(folder, ["ifeval", "gsm8k"])
    assert asked[-1][2:] == (["ifeval", "gsm8k"], None, True)  # a chat model gets chats
    adapter = str(write_adapter(tmp_path / "adapter", folder))
    evaluate_tasks(adapter, ["ifeval"])
    assert asked[-1][1] == f"pretrained={folder},dtype=auto,peft={adapter}"


def test_the_command_shows_the_metrics_and_writes_them(tmp_path, asked):
    write_model(tmp_path / "model")
    words = ["evaluate", str(tmp_path / "model"), "--lm-eval", "ifeval, gsm8k", "--limit", "2"]
    result = CliRunner().invoke(app.app, [*words, "--out", str(tmp_path / "found.json")])
    assert result.exit_code == 0, result.exception
    assert "gsm8k" in result.output and "acc,none" in result.output
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["limit"] == 2 and found["tasks"]["ifeval"]["acc,none"] == 0.5
    told = CliRunner().invoke(app.app, [*words, "--reference", "other"]).exception
    assert isinstance(told, UserError) and "--reference other is not used with --lm-eval" in str(
        told
    )
    told = CliRunner().invoke(app.app, ["evaluate", "m", "d", "--limit", "2"]).exception
    assert isinstance(told, UserError) and "--limit 2 is of --lm-eval" in str(told)


def test_what_it_cannot_do_is_told(tmp_path, asked, monkeypatch):
    write_model(tmp_path / "model")
    with pytest.raises(UserError, match="--lm-eval no-such-task: Tasks not found"):
        evaluate_tasks(str(tmp_path / "model"), ["no-such-task"])
    checkpoint = tmp_path / "run/checkpoint-4"
    (checkpoint / "engine").mkdir(parents=True)
    (checkpoint / "state.json").write_text('{"step": 4}')
    with pytest.raises(UserError, match="write its model with dpo-fast export"):
        evaluate_tasks(str(checkpoint), ["ifeval"])
    monkeypatch.delitem(sys.modules, "lm_eval")
    with pytest.raises(UserError, match="pip install lm-eval"):
        evaluate_tasks(str(tmp_path / "model"), ["ifeval"])
