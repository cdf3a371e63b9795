"""The demo: its task and tokenizer, and the quick variant from beginning to end."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_fast.demo.run import write_config
from dpo_fast.demo.student import BOS, EOS, build_tokenizer
from dpo_fast.demo.task import QUICK, WHOLE, make_questions
from dpo_fast.training.config import load_config
from tests.support.paths import ROOT

# A process of its own: a run joins a process group and says so in the environment. One thread: for a
# model this small more of them only wait, the more so where the cores are busy.
SCRIPT = """
import json, sys
from dpo_fast.training.console import quiet
quiet()
from dpo_fast.demo import run_demo
print(json.dumps(run_demo(sys.argv[1], seed=0, quick=True), default=str))
"""


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """What `run_demo` returned, with paths as strings, and what it said, under "said"."""
    folder = tmp_path_factory.mktemp("demo")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1]) | {"folder": folder, "said": done.stderr}


def numbers(questions):
    return {frozenset((question.first, question.second)) for question in questions}


@pytest.mark.parametrize("scale", [WHOLE, QUICK])
def test_held_out_pairs_of_numbers_are_unseen(scale):
    sizes = (scale.train_questions, scale.held_out_questions)
    train, held_out = make_questions(*sizes, scale.numbers, seed=0)
    assert (len(train), len(held_out)) == sizes
    assert len(set(train)) == len(train)
    assert not numbers(train) & numbers(held_out)
    assert make_questions(*sizes, scale.numbers, seed=0) == (train, held_out)
    assert make_questions(*sizes, scale.numbers, seed=1) != (train, held_out)


def test_right_answer_names_the_larger_number_wherever_it_stands():
    train, held_out = make_questions(200, 20, range(10, 40), seed=0)
    for question in train + held_out:
        low, high = sorted((question.first, question.second))
        assert str(high) in question.right and str(low) not in question.right
        assert str(low) in question.wrong and str(high) not in question.wrong
    assert len({question.first < question.second for question in train}) == 2


def test_too_few_numbers_are_refused():
    with pytest.raises(ValueError, match="too few"):
        make_questions(100, 10, range(10, 14), seed=0)


def test_tokenizer_keeps_any_text_and_puts_one_token_for_a_number():
    questions, _ = make_questions(400, 20, range(10, 40), seed=0)
    tokenizer = build_tokenizer(text for q in questions for text in (q.text, q.right, q.wrong))
    for text in (questions[0].text, "Grüße, 東京!"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert all(len(tokenizer(f" {number}")["input_ids"]) == 1 for number in range(10, 40))
    prompt = tokenizer.apply_chat_template(
        questions[0].messages, tokenize=False, add_generation_prompt=True
    )
    assert prompt == f"{BOS}<|user|>{questions[0].text}{EOS}<|assistant|>"


def test_configuration_is_valid(tmp_path):
    config = load_config(str(write_config(tmp_path, WHOLE, seed=3)))
    assert config.train.seed == 3 and config.parallel.zero_stage == 3
    assert config.reference_provider == "cached" and config.train.layout == "packed"


@pytest.mark.processes
def test_everything_it_names_exists(result):
    folder = result["folder"]
    for name in ("train.jsonl", "eval.jsonl", "dpo.yaml", "dpo/metrics.jsonl", "dpo/samples.json"):
        assert (folder / name).stat().st_size > 0, name
    for name in ("config", "sft", "checkpoint", "report"):
        assert Path(result[name]).exists()
        assert Path(result[name]).is_relative_to(folder)
    assert result["report"] in result["said"].replace("\n", "")
    samples = json.loads((folder / "dpo/samples.json").read_text())
    assert all(set(row) == {"prompt", "before", "after", "right"} for row in samples)


@pytest.mark.processes
def test_metrics_are_those_of_the_run(result):
    lines = (result["folder"] / "dpo/metrics.jsonl").read_text().splitlines()
    evaluations = [line for line in map(json.loads, lines) if "eval_loss" in line]
    steps = QUICK.train_questions // QUICK.examples_per_step
    assert [evaluations[0]["step"], evaluations[-1]["step"]] == [0, steps]
    for index, when in ((0, "before"), (-1, "after")):
        expected = evaluations[index]["eval_rewards/accuracies"]
        assert result["reward_accuracy"][when] == expected


@pytest.mark.processes
def test_dpo_improves_on_held_out_questions(result):
    accuracy, right = result["reward_accuracy"], result["right_share"]
    assert accuracy["before"] == pytest.approx(0.5, abs=0.1)  # every reward is 0: ties
    assert accuracy["after"] > 0.65
    assert all(0 <= share <= 1 for share in right.values())


@pytest.mark.processes
def test_checkpoint_loads_with_transformers_alone(result):
    model = AutoModelForCausalLM.from_pretrained(result["checkpoint"])
    tokenizer = AutoTokenizer.from_pretrained(result["checkpoint"])
    assert sum(p.numel() for p in model.parameters()) == result["parameters"]
    assert model.config.vocab_size == len(tokenizer)
