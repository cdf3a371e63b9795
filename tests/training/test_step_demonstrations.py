"""SFT on answers that nothing is compared with: a step against plain PyTorch, whole runs, evaluation."""

import json

import pytest
import torch

pytest.importorskip("deepspeed")

from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_fast.data.dataset import load_examples
from dpo_fast.data.sampler import Sampler
from dpo_fast.errors import UserError
from dpo_fast.report import write_report
from dpo_fast.training.config import build_config
from dpo_fast.training.evaluate_options import evaluation_of
from dpo_fast.training.load_data import check_kind, load_split
from tests.support import ranks
from tests.support.metrics import lines_of, series
from tests.support.models import run_tree, write_completions, write_groups, write_model, write_pairs
from tests.support.plain_torch import assert_same_step, token_logps
from tests.support.tokenizers import CHATML, byte_tokenizer

ROWS, GLOBAL, SEED = 20, 8, 42
TURNS = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello there"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Answers of very unequal lengths, so that a wrong normaliser shows."""
    folder = tmp_path_factory.mktemp("demonstrations")
    write_model(folder / "model", seed=0)
    byte_tokenizer(bos=True, template=CHATML).save_pretrained(folder / "model")
    write_pairs(folder / "pairs.jsonl", ROWS)
    write_completions(folder / "labelled.jsonl", ROWS)
    pairs = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]

    def ask(row):
        return {"role": "user", "content": row["prompt"]}

    def say(row):
        return {"role": "assistant", "content": row["chosen"]}

    rows = {
        "texts": [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs],
        "weighted": [
            {"prompt": row["prompt"], "completion": row["chosen"], "weight": 0.5 + index % 3}
            for index, row in enumerate(pairs)
        ],
        "talks": [
            {"messages": [*TURNS, ask(row), say(row)][2 * (index % 2) :]}
            for index, row in enumerate(pairs)
        ],
    }
    for name, each in rows.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, each)))
    return folder


def tree_of(folder, file, loss="sft", stage=0, data=(), **train):
    tree = run_tree(folder, global_batch_size=GLOBAL, seed=SEED, **{"max_steps": 1} | train)
    tree["data"] |= {"train": str(folder / f"{file}.jsonl"), "apply_chat_template": False}
    if file == "talks":
        del tree["data"]["apply_chat_template"]
    tree["data"] |= dict(data)
    return tree | {"loss": {"type": loss}, "parallel": {"zero_stage": stage}}


def plain_step(folder, file, data=()) -> tuple[float, dict]:
    """Minus the log-probs of the scored tokens of step 0 over their number, in fp64, by transformers."""
    config = build_config(tree_of(folder, file, data=data), "test")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    examples = load_examples(config.data, tokenizer, split="train")
    model = AutoModelForCausalLM.from_pretrained(
        folder / "model", dtype=torch.float64, attn_implementation="eager"
    )
    terms, tokens = [], 0
    for index in Sampler(len(examples), GLOBAL, 4, seed=SEED).global_batch(0):
        row = examples[index]
        if not row.get("label", True):
            continue
        logps, _ = token_logps(model, row["prompt_ids"], row["completion_ids"])
        flags = torch.tensor(row.get("completion_scored") or [True] * len(logps))
        terms.append(-(logps * flags).sum() * row.get("weight", 1.0))
        tokens += int(flags.sum())
    loss = torch.stack(terms).sum() / tokens
    loss.backward()
    return loss.item(), {f"model.{n}": p.grad for n, p in model.named_parameters()}


@pytest.mark.processes
def test_a_step_equals_plain_pytorch_however_it_is_split(folder):
    truth = {name: plain_step(folder, name) for name in ("texts", "weighted", "talks", "labelled")}
    chosen = plain_step(folder, "pairs", {"format": "sft"})
    alone = {
        "texts, padded": tree_of(folder, "texts", layout="padded", micro_batch_size=1),
        "texts, packed": tree_of(folder, "texts", layout="packed", micro_batch_size=8),
        "weighted, packed": tree_of(folder, "weighted", layout="packed"),
        "talks, padded": tree_of(folder, "talks", layout="padded", micro_batch_size=2),
        "talks, shared_prefix": tree_of(folder, "talks", layout="shared_prefix"),
        "labelled, packed": tree_of(folder, "labelled", layout="packed", micro_batch_size=2),
        "chosen of pairs": tree_of(folder, "pairs", layout="packed", data={"format": "sft"}),
        "pairs": tree_of(folder, "pairs", layout="packed"),
    }
    several = {
        "texts, zero 3": tree_of(folder, "texts", stage=3, layout="packed", micro_batch_size=1),
        "talks, zero 2": tree_of(folder, "talks", stage=2, layout="shared_prefix"),
    }
    for count, cases in ((1, alone), (2, several)):
        for name, found in ranks.first_steps(cases, count).items():
            expected = truth.get(name.split(",")[0], chosen)
            assert_same_step(found, expected, 2e-5, f"{count} ranks, {name}")


@pytest.mark.processes
def test_a_run_learns_and_says_so(folder):
    """Also with a held-out part and a stream, and beside a loss on labels, as its sft term."""
    trees = {
        "held": tree_of(folder, "talks", max_steps=8, data={"eval_rows": 4}),
        "stream": tree_of(
            folder, "texts", max_steps=3, data={"streaming": True, "stream_buffer": 20}
        ),
        "both": tree_of(folder, "labelled", ["kto", "sft"], max_steps=2, data={"eval_rows": 4}),
    }
    for name, tree in trees.items():
        tree["train"]["output_dir"] = str(folder / name)
    ranks.train(list(trees.values()))
    loss = series(folder / "held", "loss")
    assert loss[8] < loss[1] - 0.1, loss
    evaluated = series(folder / "held", "eval_loss")
    assert evaluated[8] < evaluated[0] - 0.1, evaluated
    for line in lines_of(folder / "held"):
        assert not [name for name in line if "rejected" in name or "accuracies" in name], line
    assert series(folder / "stream", "loss")[3] > 0
    assert series(folder / "both", "kl").keys() == {1, 2}
    report = write_report(folder / "held").read_text()
    assert "demonstrations" in report and "of held-out" not in report  # nothing is preferred


@pytest.mark.processes
def test_its_rows_are_evaluated_by_their_likelihood(folder):
    words = {"model": str(folder / "model"), "data": str(folder / "texts.jsonl")}
    found = ranks.evaluate({"texts": words})["texts"]
    assert (found["loss"], found["kind"]) == (["sft"], "demonstrations")
    assert found["metrics"]["eval_loss"] > 0
    with pytest.raises(UserError, match="none is preferred: a reference tells nothing"):
        evaluation_of(**words, reference=str(folder / "model"))


@pytest.mark.parametrize(
    "file, loss, changes, message",
    [
        ("texts", "sigmoid", {}, "loss.type=sigmoid needs to know which answers.*loss.type=sft"),
        ("talks", "kto", {}, "loss.type=kto needs to know which answers are better.*jsonl:1"),
        ("texts", ["sft", "sigmoid"], {}, "needs to know which answers are better"),
        ("labelled", ["sft", "sigmoid"], {}, "loss.type=sigmoid compares the two answers"),
        ("texts", "grpo", {}, "goes by the scores of several completions"),
        ("texts", "sft", {"use_weighting": True}, "loss.use_weighting=true weighs pairs by both"),
    ],
)
def test_what_needs_more_than_an_answer_is_refused(folder, file, loss, changes, message):
    tree = tree_of(folder, file, loss)
    tree["loss"] |= changes
    config = build_config(tree, "test")
    with pytest.raises(UserError, match=message):
        load_split(config, AutoTokenizer.from_pretrained(folder / "model"), "train", shuffle=True)


def test_a_single_format_counts_one_sequence_for_each_example(folder):
    """A stream's budget and the doctor's memory go by the formats alone."""
    tree = tree_of(folder, "texts", data={"format": "sft"})
    assert build_config(tree, "test").data.only_single
    tree = tree_of(folder, "texts", data={"streaming": True, "stream_buffer": 20, "format": "sft"})
    tree["train"] |= {"micro_batch_size": None, "tokens_per_batch": 127}
    build_config(tree, "test")
    tree["data"]["format"] = "auto"
    with pytest.raises(UserError, match="2 x data.max_length=128 take 254 tokens"):
        build_config(tree, "test")


def test_the_default_rate_of_sft_is_not_that_of_preferences(folder):
    """As in the alignment handbook's files for SFT, whole and with adapters."""
    rates = {}
    for loss in ("sft", "sigmoid"):
        for lora in (None, {"r": 4}):
            tree = tree_of(folder, "pairs", loss)
            del tree["train"]["learning_rate"]
            tree["model"]["lora"] = lora
            rates[loss, lora is not None] = build_config(tree, "test").learning_rate
    assert rates == {
        ("sft", False): 2e-5,
        ("sft", True): 2e-4,
        ("sigmoid", False): 5e-7,
        ("sigmoid", True): 5e-6,
    }


def test_groups_are_told_how_sft_takes_them(folder, tmp_path):
    write_groups(tmp_path / "groups.jsonl", 4)
    tree = tree_of(folder, "texts", data={"train": str(tmp_path / "groups.jsonl")})
    config = build_config(tree, "test")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    examples = load_examples(config.data, tokenizer, split="train")
    with pytest.raises(UserError, match="learns one answer of a row.*set data.format=sft"):
        check_kind(config, "train", examples)
