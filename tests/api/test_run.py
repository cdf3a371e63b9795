"""`PreferenceRun`: the run of the command line on objects, and a process that is as it was."""

import json
import logging
import math
import multiprocessing
import os
import random
import signal
import sys
import threading

import datasets
import numpy as np
import pytest
import torch

pytest.importorskip("deepspeed")

from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import dpo_fast
from dpo_fast import PreferenceRun, RunConfig
from dpo_fast.api.options import lora_section, tree_of
from dpo_fast.api.process import as_found
from dpo_fast.errors import Interrupted, UserError
from tests.support import ranks
from tests.support.metrics import lines_of
from tests.support.models import changed, run_tree, write_model, write_pairs

TIMES = ("perf/", "num_tokens")  # what two runs of the same differ by begins so


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("api")
    write_model(folder / "model")
    write_pairs(folder / "pairs.jsonl", 20)
    return folder


@pytest.fixture(scope="module")
def rows(folder):
    return [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]


def options(folder, output: str) -> dict:
    """Of a short run, without model and data."""
    tree = changed(run_tree(folder, max_steps=3, save_steps=2), folder / output)
    tree["parallel"] = {"zero_stage": 0}
    del tree["data"]["train"], tree["model"]["path"]
    return tree


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "final/model.safetensors")


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def told(lines: list[dict]) -> list[dict]:
    return [{k: v for k, v in line.items() if not k.startswith(TIMES)} for line in lines]


def process() -> dict:
    """What a run may not change."""
    return {
        "environment": dict(os.environ),
        "signals": [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)],
        "grouped": torch.distributed.is_initialized(),
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "draws": (random.getstate(), torch.random.get_rng_state().tolist()),
        "numpy": np.random.get_state()[1].tolist(),
        "logging": (logging.getLogger().level, logging.root.manager.disable),
        "bars": datasets.are_progress_bars_disabled(),
        "told": sys.excepthook,
        "children": multiprocessing.active_children(),
        "default": dpo_fast.__version__,
    }


@pytest.mark.slow
@pytest.mark.processes
def test_objects_train_as_the_command_line_bit_for_bit_and_the_process_is_as_it_was(folder, rows):
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    ranks.train([changed(run_tree(folder, max_steps=3, save_steps=2), folder / "file",
                         parallel={"zero_stage": 0}, data={"eval_rows": 4})])  # fmt: skip
    before = process()
    run = PreferenceRun(
        model,
        options(folder, "objects"),
        train_dataset=rows,
        processing_class=tokenizer,
        eval_rows=4,
    )
    result = run.train()
    assert process() == before
    assert result.model == folder / "objects/final"
    # The same engine on the same rows and weights, in a process of its own and from paths.
    assert same(weights(folder / "objects"), weights(folder / "file"))
    assert told(run.metrics) == told(lines_of(folder / "file"))
    assert [line["step"] for line in result.metrics if "loss" in line] == [1, 2, 3]
    assert list(result.dataframe()["step"]) == [line["step"] for line in result.metrics]
    # The model that was handed over has the trained weights now.
    trained = AutoModelForCausalLM.from_pretrained(folder / "objects/final").state_dict()
    assert same(dict(model.state_dict()), dict(trained))
    # Evaluation of what it trained: the last one of the run itself, then other rows.
    last = [line for line in run.metrics if "eval_loss" in line][-1]
    assert run.evaluate()["eval_loss"] == pytest.approx(last["eval_loss"], rel=1e-5)
    other = run.evaluate(datasets.Dataset.from_list(rows[:3]))
    assert 0 < other["eval_loss"] != last["eval_loss"] and process() == before
    saved = run.save(folder / "saved")
    assert same(load_file(saved / "model.safetensors"), weights(folder / "objects"))
    with pytest.raises(UserError, match="is there already"):
        run.save(folder / "saved")
    # A second run of the same process begins where the first one's checkpoint is, with the same objects.
    again = PreferenceRun(
        AutoModelForCausalLM.from_pretrained(folder / "model"),
        options(folder, "objects"),
        train_dataset=rows,
        processing_class=tokenizer,
        eval_rows=4,
    )
    before = weights(folder / "objects")
    gone_on = again.train(resume_from_checkpoint=str(folder / "objects/checkpoint-2"))
    assert [line["step"] for line in gone_on.metrics if "loss" in line] == [1, 2, 3]
    assert same(weights(folder / "objects"), before)
    assert len(list((folder / "objects/inputs").glob("model-*"))) == 1


def test_a_signal_ends_it_with_a_checkpoint_and_the_next_run_goes_on(folder, rows):
    before = process()
    run = PreferenceRun(
        folder / "model", options(folder, "stopped"), train_dataset=rows, max_steps=40
    )
    main = threading.main_thread().ident

    def press() -> None:
        while not run.metrics or run.metrics[-1]["step"] < 2:
            done.wait(0.01)
        signal.pthread_kill(main, signal.SIGINT)

    done = threading.Event()
    threading.Thread(target=press, daemon=True).start()
    with pytest.raises(Interrupted, match="resume with train.resume_from_checkpoint="):
        run.train()
    assert process() == before
    step = run.metrics[-1]["step"]
    assert 2 <= step < 40
    on = PreferenceRun(folder / "model", run.config, train_dataset=rows)
    assert on.train(resume_from_checkpoint=True).metrics[-1]["step"] == 40


def test_adapters_of_pefts_configuration_leave_the_object_as_it_was(folder, rows):
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    table = datasets.Dataset.from_list(rows)
    run = PreferenceRun(
        model,
        options(folder, "adapters"),
        train_dataset=table,
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules={"q_proj", "v_proj"}),
        **{"train.max_steps": 1, "loss": {"type": ["sigmoid", "sft"], "weights": [1, 0.1]}},
    )
    assert run.train().model.joinpath("adapter_model.safetensors").is_file()
    assert same(dict(model.state_dict()), start)
    lora = run.config.model.lora
    assert (lora.r, lora.alpha, lora.target_modules) == (4, 8, ["q_proj", "v_proj"])
    assert run.config.loss.weights == [1.0, 0.1] and run.config.model.dtype == "fp32"


def test_options_are_sections_dotted_keys_or_keys_of_one_section(folder):
    tree = tree_of(None, {"beta": 0.2, "train.max_steps": 3, "data": {"max_length": 9}, "seed": 5})
    assert tree == {
        "loss": {"beta": 0.2},
        "train": {"max_steps": 3, "seed": 5},
        "data": {"max_length": 9},
    }
    given = {"loss": {"beta": 0.3, "type": "ipo"}}
    assert tree_of(given, {"beta": 0.4})["loss"] == {"beta": 0.4, "type": "ipo"}
    assert given["loss"]["beta"] == 0.3
    config = RunConfig(**run_tree(folder))
    assert tree_of(config, {"loss_type": "ipo"})["loss"] == {"type": "ipo"}
    with pytest.raises(UserError, match="no option learning_rat; did you mean learning_rate"):
        tree_of(None, {"learning_rat": 1})
    with pytest.raises(UserError, match=r"cache_dir may be data.cache_dir or reference.cache_dir"):
        tree_of(None, {"cache_dir": "x"})
    with pytest.raises(UserError, match="config is a int"):
        tree_of(3, {})


def test_what_peft_configures_and_we_do_not_have_is_named():
    assert lora_section(LoraConfig(), "llama")["target_modules"] == ["q_proj", "v_proj"]
    with pytest.raises(UserError, match="peft has no default for unheard"):
        lora_section(LoraConfig(), "unheard")
    with pytest.raises(UserError, match="peft_config.lora_bias=True has no counterpart"):
        lora_section(LoraConfig(lora_bias=True, target_modules=["q_proj"]), None)
    with pytest.raises(UserError, match="peft_config is a dict"):
        lora_section({}, None)


def test_objects_in_the_place_of_names_and_names_of_trls_are_told_with_the_argument_that_is_meant():
    def loss(logps, options):
        return -logps.chosen

    for given, message in (
        ({"loss_type": loss}, "loss.type is a function, .*@register_loss"),
        ({"train": {"callbacks": [object()]}}, "train.callbacks is a object, .*callbacks="),
        ({"train.sampler": loss}, "train.sampler is a function, .*give it as sampler="),
        ({"tokenizer": object()}, "model.tokenizer is a object.*processing_class="),
        ({"loss": "ipo"}, "loss is a section; give its keys"),
        ({"args": 1}, "no option args; options of TRL's"),
        ({"bf16": True}, "no option bf16; it is dtype="),
    ):
        with pytest.raises(UserError, match=message):
            tree_of(None, given)
    # What such a message says to write is taken.
    for options in ({"dtype": "bf16"}, {"model.dtype": "bf16"}):
        assert PreferenceRun("m", output_dir="r", **options)._tree["model"]["dtype"] == "bf16"


def test_what_every_run_needs_is_named_by_its_argument(folder, rows, tmp_path):
    for arguments, message in (
        ({"train_dataset": rows}, "model.path is missing; give it as the first argument"),
        ({"model": folder / "model"}, "data.train is missing; give it as train_dataset="),
    ):
        with pytest.raises(UserError, match=message):
            PreferenceRun(**arguments, output_dir=str(tmp_path)).train()


def test_a_model_is_evaluated_without_rows_to_train_on(folder, rows):
    run = PreferenceRun(
        folder / "model", options(folder, "untrained"), eval_dataset=rows[:4], eval_steps=2
    )
    found = run.evaluate()
    assert found["eval_loss"] == pytest.approx(math.log(2))  # the reference is the model itself
    # Other rows, and several by their names, which stand in their metrics.
    named = run.evaluate({"few": rows[:2], "all": rows[:4]})
    assert named["eval_all_logps/chosen"] == found["eval_logps/chosen"]
    assert named["eval_few_logps/chosen"] == run.evaluate(rows[:2])["eval_logps/chosen"]
    assert len(named) == 2 * len(found)
    for method, message in (
        (run.train, "data.train is missing; give it as train_dataset="),
        (lambda: run.evaluate({"prompt": ["a"], "chosen": ["b"]}), "is a dict of prompt, chosen"),
        (lambda: run.save(folder / "nowhere"), "nothing is trained"),
    ):
        with pytest.raises(UserError, match=message):
            method()
    # The model as it is now, for nothing of it is kept.
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    run = PreferenceRun(model, options(folder, "changing"), processing_class=tokenizer)
    with pytest.raises(UserError, match="no rows to evaluate on; give it as eval_dataset="):
        run.evaluate()
    assert run.evaluate(rows[:4])["eval_logps/chosen"] == found["eval_logps/chosen"]
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    assert run.evaluate(rows[:4])["eval_logps/chosen"] != found["eval_logps/chosen"]
    model.lm_head.requires_grad_(False)
    assert PreferenceRun(torch.compile(model), output_dir="r")._model is model
    with pytest.raises(UserError, match=r"model has frozen weights.*lm_head.weight"):
        PreferenceRun(model, options(folder, "changing"), train_dataset=rows).train()


def test_a_home_folder_is_the_same_for_the_run_and_for_what_is_read_of_it(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert PreferenceRun(output_dir="~/runs").output_dir == tmp_path / "runs"


def test_what_surrounds_a_run_changes_no_number():
    weight = torch.nn.Parameter(torch.ones(4, 4))
    torch.set_default_dtype(torch.float64)
    try:
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad(), as_found():
            found = torch.ones(2, 4) @ weight
        assert found.dtype == torch.float32 and found.requires_grad
        with torch.inference_mode(), as_found():
            assert not torch.ones(1).is_inference()
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
