"""What the documents show of Python runs as it stands there, on a tiny model called my-model."""

import json
import re
import textwrap
from pathlib import Path

import pytest
import yaml

pytest.importorskip("deepspeed")
pytest.importorskip("pandas")

from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_fast import PreferenceRun
from dpo_fast.losses.custom import CUSTOM
from tests.support.models import write_model, write_pairs
from tests.support.paths import ROOT


@pytest.fixture
def rows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "my-model")
    file = write_pairs(tmp_path / "my-pairs.jsonl", 24)
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_run_of_the_readme(rows, tmp_path):
    text = (ROOT / "README.md").read_text()
    (block,) = re.findall(
        r"^    from dpo_fast import PreferenceRun\n(?:(?:    .*)?\n)+", text, re.M
    )
    assert "eval_rows=200" in block
    names = {"rows": rows, "other_rows": rows[:4]}
    block = textwrap.dedent(block).replace("eval_rows=200", "eval_rows=4")
    exec(compile(block, "README.md", "exec"), names)
    assert names["result"].metrics[-1]["step"] == 1
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "my-aligned-model")


def test_the_run_of_the_python_page(rows):
    text = (ROOT / "docs/PYTHON.md").read_text()
    block = re.findall(r"```python\n(.*?)```", text, re.S)[0]
    steps = '"train.max_steps": 500'
    assert steps in block
    names = {
        "rows": rows,
        "model": AutoModelForCausalLM.from_pretrained("my-model"),
        "tokenizer": AutoTokenizer.from_pretrained("my-model"),
    }
    block = block.replace(steps, '"train.max_steps": 1')
    exec(compile(block, "PYTHON.md", "exec"), names)
    result = names["result"]
    assert (result.model / "adapter_model.safetensors").is_file()
    # A notebook shows what a cell ends with: not every metric of the run.
    assert repr(result).startswith("Result(model=") and "loss" not in repr(result)


def test_the_callback_and_the_sampler_of_the_python_page(rows):
    """Files of the names that stand in their first lines, used as the page says."""
    text = (ROOT / "docs/PYTHON.md").read_text()
    files = re.findall(r"```python\n# (my_\w+\.py)\n(.*?)```", text, re.S)
    for name, block in files:
        Path(name).write_text(block)
    assert dict(files).keys() == {"my_callbacks.py", "my_samplers.py"}
    uses = re.findall(r"dpo-fast train run.yaml '?train\.(\w+)=(.*?)'?$", text, re.M)
    options = {f"train.{name}": yaml.safe_load(value) for name, value in uses}
    assert options.keys() == {"train.callbacks", "train.sampler"}
    options["train.callbacks"][0]["my_callbacks.py:StopAt"]["loss"] = 1.0  # every loss is below it
    own = {"output_dir": "runs/own", "global_batch_size": 8, "num_train_epochs": 3}
    result = PreferenceRun(
        "my-model", train_dataset=rows, logging_steps=1, **own, **options
    ).train()
    assert result.metrics[-1]["step"] == 1  # of nine: the callback ended it


def test_the_loss_of_the_training_page():
    from dpo_fast import PreferenceLoss

    text = (ROOT / "docs/TRAINING.md").read_text()
    (block,) = re.findall(r"```python\n(# my_losses.py\n.*?)```", text, re.S)
    try:
        exec(compile(block, "my_losses.py", "exec"), {})
        import torch

        loss, _ = PreferenceLoss("wide", beta=0.5, simpo_gamma=1.0)(
            torch.tensor([-1.0, -2.0]), torch.tensor([-3.0, -2.0])
        )
        assert loss.item() == pytest.approx((0.0 + 1.0) / 2)
    finally:
        CUSTOM.pop("wide", None)
