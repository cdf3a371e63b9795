"""What a run says before it begins: rows with what became of them, steps, model."""

import json

import pytest

pytest.importorskip("deepspeed")

from dpo_fast.models import ScoringModel, load_tokenizer
from dpo_fast.training import summary
from dpo_fast.training.config import build_config
from dpo_fast.training.load_data import load_split
from tests.support.architectures import make
from tests.support.models import run_tree, write_model, write_pairs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("summary")
    write_model(folder / "model")
    file = write_pairs(folder / "pairs.jsonl", 20)
    bad = [{"prompt": "a", "chosen": "b", "rejected": "b"}, {"prompt": "", "chosen": "b"}]
    long = {"prompt": "p" * 200, "chosen": "yes", "rejected": "no"}
    with file.open("a") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in (*bad, bad[0], long))
    return folder


def lines(folder, steps: int, data: dict, **train) -> list[str]:
    tree = run_tree(folder, **train)
    tree["data"] |= data | {"on_bad_row": "skip"}
    config = build_config(tree, "run")
    tokenizer = load_tokenizer(config.model)
    splits = [load_split(config, tokenizer, "train", shuffle=True)]
    if config.data.has_eval:
        splits.append(load_split(config, tokenizer, "eval", shuffle=False))
    return list(summary.data_lines(config, splits, steps))


def test_rows_that_are_left_out_and_cut_are_told_with_reasons(folder):
    told = lines(folder, 4, {"eval_rows": 5})
    assert told[0] == "train: 16 pairs" and told[-2] == "eval: 5 pairs"
    assert told[1] == "  1 of 24 rows bad: missing field 'rejected' (1)"
    assert told[2] == "  2 of 24 rows dropped: chosen equals rejected (2)"
    assert "  1 of 21 prompts were cut to fit data.max_length" in told
    assert "  5 of 21 pairs are held out for evaluation" in told
    assert told[-1] == (
        "4 steps, 2 epochs, 8 pairs a step, on one rank (cpu, fp32, ZeRO 0); learning rate 0.001, cosine"
    )
    assert sum("cut" in line for line in told) == 1, "the two splits share a report"


def test_a_stream_says_what_it_knows(folder):
    data = {"streaming": True, "stream_buffer": 16, "max_length": 64}
    tree = {"max_steps": 3, "learning_rate": 1e-5}
    told = lines_of_stream(folder, data, tree)
    assert told[0] == "train: a stream of pairs; of the first 16 rows:"
    assert told[-1].startswith("3 steps, 8 pairs a step, on one rank")


def lines_of_stream(folder, data: dict, train: dict) -> list[str]:
    tree = run_tree(folder, **train)
    tree["data"] |= data | {"on_bad_row": "skip"}
    config = build_config(tree | {"reference": {"provider": "frozen"}}, "run")
    split = load_split(config, load_tokenizer(config.model), "train", shuffle=True)
    return list(summary.data_lines(config, [split], 3))


def test_the_size_of_a_model_and_of_what_is_trained(monkeypatch):
    said = []
    monkeypatch.setattr(summary, "say", said.append)
    model = ScoringModel(make("llama"))
    whole = sum(p.numel() for p in model.parameters())
    summary.tell_model(model)
    model.causal_lm.get_input_embeddings().weight.requires_grad_(False)
    summary.tell_model(model)
    assert said[0] == f"LlamaForCausalLM with {whole:,} parameters"
    assert said[1].endswith(f"parameters, {whole - 97 * 32:,} of them trained")
    assert summary._count(134_515_008) == "135 million" and summary._count(7_000) == "7,000"
