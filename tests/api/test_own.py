"""Callbacks and samplers from Python: objects, the same by name on the command line, and on two ranks."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("deepspeed")

from dpo_fast import Callback, PreferenceRun
from dpo_fast.api.own import named_callbacks, named_sampler
from dpo_fast.data.sampler import _permutation
from dpo_fast.errors import UserError
from dpo_fast.training.config import build_config
from tests.support import ranks
from tests.support.here import train
from tests.support.metrics import lines_of
from tests.support.models import changed, run_tree, write_model, write_pairs
from tests.support.paths import ENVIRONMENT

SOURCE = """
import numpy as np
from dpo_fast import Callback

def longest_first(rows, epoch):
    return np.argsort(-rows.prompt_tokens - rows.longest_answer_tokens, kind="stable")

class Saves(Callback):
    def on_step_end(self, state, control):
        control.should_save = state.step == 1
"""
SCRIPT = """
import json, os, sys
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from dpo_fast import PreferenceRun
sys.path.insert(0, sys.argv[1])
from mine import Saves, longest_first
folder, tree = sys.argv[1], json.loads(sys.argv[2])
of = AutoModelForCausalLM.from_pretrained
rows = [json.loads(line) for line in open(f"{folder}/pairs.jsonl")]
for name in tree.pop("runs"):
    tree["train"]["output_dir"] = f"{folder}/{name}"
    model, reference = of(f"{folder}/model"), of(f"{folder}/other")
    if name == "adapters":
        options = LoraConfig(r=2, target_modules=["q_proj"])
        model, reference = get_peft_model(model, options), None
    run = PreferenceRun(
        model, tree, train_dataset=Dataset.from_list(rows), ref_model=reference,
        processing_class=AutoTokenizer.from_pretrained(f"{folder}/model"),
        callbacks=[Saves()], sampler=longest_first)
    result = run.train()
    found = run.evaluate()
    with open(f"{folder}/told-{name}-{os.environ['RANK']}.json", "w") as file:
        json.dump([result.model.is_dir(), result.report is not None, found], file)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    write_model(folder / "model")
    write_model(folder / "other", seed=1)
    write_pairs(folder / "pairs.jsonl", 20)
    (folder / "mine.py").write_text(SOURCE)
    return folder


def tree(folder, name: str, **train_options) -> dict:
    found = changed(run_tree(folder, max_steps=4), folder / name, train=train_options)
    found["parallel"] = {"zero_stage": 0}
    return found


def run(folder, name: str, **options) -> PreferenceRun:
    return PreferenceRun(folder / "model", tree(folder, name), **options)


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in lines_of(folder) if "loss" in line]


def test_objects_have_names_in_the_configuration():
    class Mine(Callback):
        pass

    one, two = Mine(), Mine()
    assert named_callbacks(one) == (["Mine"], {"Mine": one})
    assert named_callbacks([one, "a:b", {"c:d": {"e": 1}}, two, Mine]) == (
        ["Mine", "a:b", {"c:d": {"e": 1}}, "Mine-2", "Mine-3"],
        {"Mine": one, "Mine-2": two, "Mine-3": Mine},
    )
    assert named_callbacks("a:b") == (["a:b"], {}) and named_callbacks(Mine) == (
        *[["Mine"], {"Mine": Mine}],
    )
    with pytest.raises(UserError, match="callbacks has a:b twice"):
        named_callbacks(["a:b", "a:b"])
    assert named_sampler("a:b") == ("a:b", {})
    assert named_sampler(max) == ("max", {"max": max})
    give = lambda rows, epoch: rows  # noqa: E731
    assert named_sampler(give) == ("sampler", {"sampler": give})


def test_a_sampler_orders_the_rows_and_a_run_goes_on_with_it(folder):
    def as_always(rows, epoch):
        return _permutation(len(rows), rows.seed, epoch)

    def longest_first(rows, epoch):
        return np.argsort(-rows.prompt_tokens - rows.longest_answer_tokens, kind="stable")

    class Stop(Callback):
        def on_step_end(self, state, control):
            control.should_training_stop = state.step == 2

    run(folder, "default").train()
    same = run(folder, "same", sampler=as_always)
    assert [line["loss"] for line in same.train().metrics if "loss" in line] == losses(
        folder / "default"
    )
    own = run(folder, "own", sampler=longest_first, callbacks=Stop())
    result = own.train()
    assert result.report.is_file() and result.pushed is None and len(losses(folder / "own")) == 2
    # By name from a file, without an interruption: the same run. It saves its first step beside.
    file = str(folder / "mine.py")
    options = {"sampler": f"{file}:longest_first", "callbacks": f"{file}:Saves"}
    train(build_config(tree(folder, "named", **options), "case"))
    assert losses(folder / "named") != losses(folder / "default")
    assert (folder / "named/checkpoint-1").is_dir()
    resumed = run(folder, "own", sampler=longest_first).train(resume_from_checkpoint=True)
    assert [line["loss"] for line in resumed.metrics if "loss" in line] == losses(folder / "named")
    with pytest.raises(
        UserError, match="train.sampler was 'longest_first, in the order .* and is No"
    ):
        run(folder, "own").train(resume_from_checkpoint=True)
    with pytest.raises(UserError, match="train.sampler=longest_first: no plugin has this name"):
        PreferenceRun(config=str(folder / "own/config.yaml")).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    "sections, message",
    [
        (
            {"train": {"tokens_per_batch": 900, "micro_batch_size": None}},
            "train.tokens_per_batch=900 br",
        ),
        ({"train": {"group_prompts": True}}, "train.group_prompts=True brings them into another"),
        (
            {"data": {"streaming": True}},
            "data.streaming=true, but train.sampler=mine orders all of",
        ),
    ],
)
def test_what_orders_rows_itself_goes_with_no_sampler(folder, sections, message):
    refused = tree(folder, "refused", sampler="mine")
    for name, options in sections.items():
        refused[name] |= options
    with pytest.raises(UserError, match=message):
        build_config(refused, "case")


def test_a_mixture_goes_with_no_sampler(folder):
    mixture = run(folder, "mixture", sampler=[0, 1, 2])
    write_pairs(folder / "more.jsonl", 20, seed=1)
    files = [{"path": str(folder / f"{name}.jsonl"), "weight": 1} for name in ("pairs", "more")]
    mixture._tree["data"]["train"] = files
    with pytest.raises(UserError, match="train.sampler=list, but data.train is a mixture"):
        mixture.train()


@pytest.mark.slow
@pytest.mark.processes
def test_a_script_under_torchrun_is_the_command_line_on_as_many_ranks(folder):
    """Model, reference, adapters, rows, callback and sampler as objects; two runs in one process group."""
    base = tree(folder, "unused", micro_batch_size=2)
    base["data"] |= {"eval_rows": 4}
    del base["model"]["path"], base["data"]["train"]
    (folder / "script.py").write_text(SCRIPT)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    launch += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    words = [str(folder), json.dumps(base | {"runs": ["python", "adapters"]})]
    done = subprocess.run(
        [*launch, str(folder / "script.py"), *words],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    for name in ("python", "adapters"):
        told = [json.loads((folder / f"told-{name}-{rank}.json").read_text()) for rank in (0, 1)]
        assert told[0][:2] == [True, True] and told[1][:2] == [True, False]
        assert told[0][2] == told[1][2] and "eval_loss" in told[0][2]
    assert (folder / "adapters/final/adapter_model.safetensors").is_file()
    # The same from files.
    named = changed(base, folder / "shell")
    named["model"]["path"], named["reference"] = (
        str(folder / "model"),
        {"path": str(folder / "other")},
    )
    named["data"]["train"] = str(folder / "pairs.jsonl")
    named["train"] |= {"sampler": f"{folder}/mine.py:longest_first"}
    named["train"] |= {"callbacks": [f"{folder}/mine.py:Saves"]}
    ranks.train([named], ranks=2)
    python, shell = folder / "python", folder / "shell"
    assert without_times(lines_of(python)) == without_times(lines_of(shell))
    for name in ("checkpoint-1/engine", "checkpoint-4/engine", "final"):
        for file in (python / name).rglob("*.safetensors"):
            assert file.read_bytes() == (shell / file.relative_to(python)).read_bytes(), file
    states = [torch.load(each / "checkpoint-4/rank-1.pt") for each in (python, shell)]
    assert torch.equal(states[0]["random"]["cpu"], states[1]["random"]["cpu"])


def without_times(lines: list[dict]) -> list[dict]:
    return [{k: v for k, v in each.items() if not k.startswith("perf/")} for each in lines]
