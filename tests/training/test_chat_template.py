"""A run of chats: the template and the model's ends of turn, from the command line to the export."""

import json
import subprocess
import sys

import pytest
import yaml

pytest.importorskip("deepspeed")

from tests.support.models import run_tree, write_model
from tests.support.paths import ENVIRONMENT
from tests.support.tokenizers import CHATML, EOS, IM_START

TEMPLATE = "{{ mood }}" + CHATML
STREAM = {"streaming": True}


def run(*arguments) -> str:
    command = [sys.executable, "-m", "dpo_fast", *map(str, arguments)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chats")
    model = write_model(folder / "model")
    generation = model / "generation_config.json"
    ends = {"eos_token_id": [EOS, IM_START]}
    generation.write_text(json.dumps(json.loads(generation.read_text()) | ends))
    (folder / "mine.jinja").write_text(TEMPLATE)
    with (folder / "pairs.jsonl").open("w") as file:
        for index in range(16):
            row = {"prompt": [{"role": "user", "content": f"{index}?"}]}
            for name, text in (("chosen", "yes"), ("rejected", "no")):
                row[name] = [{"role": "assistant", "content": text}]
            file.write(json.dumps(row) + "\n")
    tree = run_tree(folder, max_steps=1)
    tree["data"] |= {
        "chat_template": str(folder / "mine.jinja"),
        "chat_template_kwargs": {"mood": "Be glad. "},
    }
    return tree


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize("data", [{}, STREAM], ids=["stored", "streamed"])
def test_the_template_is_exported_with_the_model(tree, tmp_path, data):
    from transformers import AutoTokenizer

    tree = tree | {"data": tree["data"] | data}
    tree |= {"model": tree["model"] | {"lora": {"r": 2, "alpha": 4}}}
    tree |= {"train": tree["train"] | {"output_dir": str(tmp_path), "merge_lora": True}}
    if data:
        tree |= {"reference": {"provider": "adapter_off"}}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(tree))
    run("train", file)
    for folder in ("final", "final/merged"):
        assert AutoTokenizer.from_pretrained(tmp_path / folder).chat_template == TEMPLATE


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize("data", [{}, STREAM], ids=["stored", "streamed"])
def test_commands_know_where_the_model_stops(tree, tmp_path, data):
    """The template ends no turn, and the generation config stops at the beginning of the next one."""
    bare = tmp_path / "bare.jinja"
    bare.write_text(TEMPLATE.replace("<|im_end|>\n", ""))
    data = tree["data"] | data | {"chat_template": str(bare)}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(tree | {"data": data, "reference": {"provider": "frozen"}}))
    shown = run("data", file).replace("·", "")
    assert "glad. <|im_start|>user" in shown
    assert "⟦yes<|im_start|>⟧" in shown
