"""Runs whose ranks share micro-batches: the same steps, metrics and checkpoints as on one rank."""

import json
import math
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers

pytest.importorskip("deepspeed")

from safetensors.torch import load_file

from dpo_fast.errors import UserError
from dpo_fast.models.architecture import Architecture
from dpo_fast.training import data_ranks
from dpo_fast.training.config import build_config
from dpo_fast.training.examine import Row, one_of_each
from dpo_fast.training.fit import check_run, check_sequence_parallel
from tests.support import ranks
from tests.support.metrics import lines_of, series
from tests.support.models import (
    changed,
    run_tree,
    write_architecture,
    write_completions,
    write_groups,
    write_model,
    write_pairs,
)
from tests.support.plain_torch import assert_same_step

ROWS, GLOBAL = 10, 8
MIXTURE = {"type": ["sigmoid", "sft", "ipo"], "weights": [1.0, 0.4, 0.01], "beta": 0.3}
FROZEN = {"provider": "frozen", "path": "near"}
BY_TOKENS = {"micro_batch_size": None, "tokens_per_batch": 150}
RUNS = {
    "pairs": {"loss": MIXTURE, "reference": FROZEN},
    "stored": {"loss": MIXTURE, "reference": {"provider": "cached", "path": "near"}},
    "by token": {
        "loss": {"type": "sigmoid", "beta": 0.3, "ld_alpha": 0.3, "use_weighting": True},
        "reference": {"provider": "cached", "path": "near", "per_token": True},
    },
    "tokens": {"loss": MIXTURE, "reference": FROZEN, "train": BY_TOKENS},
    "adapters": {"model": {"lora": {"r": 4, "alpha": 8}}},
    "checkpointed": {"loss": MIXTURE, "model": {"gradient_checkpointing": True}},
    "aot": {"loss": {"type": ["aot", "sft"], "weights": [1.0, 0.5], "beta": 0.3}}
    | {"reference": FROZEN},
    "kto": {"loss": {"type": "kto", "beta": 0.03}, "reference": FROZEN, "rows": "completions"},
    "grpo": {"loss": {"type": "grpo"}, "reference": FROZEN, "rows": "groups"},
    "experts": {"loss": MIXTURE, "model": {"path": "experts", "router_aux_loss_coef": 0.5}},
    "experts, aot": {
        "loss": {"type": "aot", "beta": 0.3},
        "model": {"path": "experts", "router_aux_loss_coef": 0.5},
    },
}
# By ranks: a run, ranks that share a micro-batch, ZeRO stage, layout. There are 2 key heads: 4 repeat them.
STEPS = {
    2: [
        ("pairs", 2, 0, "padded"),
        ("pairs", 2, 1, "packed"),
        ("pairs", 2, 2, "shared_prefix"),
        ("pairs", 2, 3, "shared_prefix"),
        ("by token", 2, 3, "packed"),
        ("tokens", 2, 2, "packed"),
        ("adapters", 2, 3, "packed"),
        ("checkpointed", 2, 3, "shared_prefix"),
        ("grpo", 2, 0, "packed"),
        ("experts", 2, 3, "padded"),
        ("experts, aot", 2, 2, "packed"),
    ],
    4: [
        ("pairs", 4, 3, "padded"),
        ("stored", 2, 2, "shared_prefix"),
        ("aot", 2, 3, "packed"),
        ("kto", 2, 1, "padded"),
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    write_model(folder / "model", seed=0)
    write_model(folder / "near", seed=2)
    write_architecture(folder / "experts", "qwen3-moe, experts")
    write_pairs(folder / "pairs.jsonl", ROWS)
    write_pairs(folder / "held-out.jsonl", 5, seed=1)
    write_completions(folder / "completions.jsonl", 2 * ROWS)
    write_groups(folder / "groups.jsonl", ROWS)
    return folder


def tree_of(folder: Path, name: str, shared: int = 1, stage="auto", **sections) -> dict:
    options = json.loads(json.dumps(RUNS[name]))
    rows = options.pop("rows", "pairs")
    tree = run_tree(folder, global_batch_size=GLOBAL, micro_batch_size=2, max_steps=1)
    tree["data"]["train"] = str(folder / f"{rows}.jsonl")
    parallel = {"zero_stage": stage, "sequence_parallel": shared}
    for more in (options, {"parallel": parallel}, sections):
        tree = changed(tree, folder / "run", **more)
    for section in ("reference", "model"):
        if "path" in tree.get(section, {}):
            tree[section]["path"] = str(folder / tree[section]["path"])
    return tree


@pytest.fixture(scope="module")
def truth(folder):
    """The first step of each run on one rank."""
    trees = {name: tree_of(folder, name, train={"layout": "packed"}) for name in RUNS}
    for name, tree in trees.items():
        tree["train"] |= RUNS[name].get("train", {})
    return ranks.first_steps(trees)


@pytest.mark.processes
@pytest.mark.parametrize("count", STEPS)
def test_the_step_is_that_of_one_rank(folder, truth, count):
    """Loss and every gradient: what is gathered, summed and averaged over which ranks."""
    trees = {}
    for name, shared, stage, layout in STEPS[count]:
        own = RUNS[name].get("train", {})
        tree = tree_of(folder, name, shared, stage, train={"layout": layout} | own)
        if "cached" in tree.get("reference", {}).values():  # these ranks compute it
            tree["reference"]["cache_dir"] = str(folder / f"by {count} for {name}")
        trees[f"{name}: {shared} share, ZeRO {stage}, {layout}"] = tree
    for name, result in ranks.first_steps(trees, count).items():
        assert_same_step(result, truth[name.split(":")[0]], 1e-5, f"{count} ranks, {name}")


# Of query and of key heads: numbers that four ranks divide, are more than, or do not divide.
HEADS = {
    "llama [8, 8]": {"num_key_value_heads": 8, "num_attention_heads": 8},
    "llama [4, 1]": {"num_key_value_heads": 1},
    "llama [12, 6]": {"num_key_value_heads": 6, "num_attention_heads": 12, "hidden_size": 48},
    "llama [12, 3]": {"num_key_value_heads": 3, "num_attention_heads": 12, "hidden_size": 48},
    "gpt-oss, sinks [4, 1]": {"num_key_value_heads": 1},
    "mistral, window [4, 1]": {"num_key_value_heads": 1},
}


@pytest.mark.processes
def test_every_rank_has_the_key_heads_of_its_query_heads():
    ranks.group(4).do("compare_slices", {"llama": {}} | HEADS, 1e-5)


WHOLE = {
    "train": {"max_steps": 4, "save_steps": 2, "eval_steps": 2},
    "reference": {"provider": "ema", "mixup_alpha": 0.5, "sync_steps": 2},
    "log": {"logging_steps": 3, "token_metrics": True},  # the checkpoint falls into an open window
    "generate": {"max_prompts": 3, "max_new_tokens": 4, "batch_size": 2, "steps": 2},
}


@pytest.fixture(scope="module")
def runs(folder):
    """Whole runs: of one rank, of two that share, and the second half of that on other ranks."""

    def run(name: str, shared: int, **train) -> dict:
        tree = changed(tree_of(folder, "kto", shared), folder / name, **WHOLE)
        tree["reference"].pop("path")
        tree["loss"] = {"type": ["kto", "bco"], "weights": [1.0, 0.3], "beta": 0.03}
        tree["data"]["train"] = str(folder / "pairs.jsonl")
        tree["data"]["eval"] = str(folder / "held-out.jsonl")
        tree["train"] |= train
        return tree

    checkpoint = str(folder / "shared" / "checkpoint-2")
    going_on = {"resume_from_checkpoint": checkpoint}
    ranks.train([run("alone", 1)])
    ranks.train(
        [run("shared", 2), run("resumed", 2, **going_on), run("apart", 1, **going_on)], ranks=2
    )
    ranks.train([run("moved", 1, **going_on)])
    return folder


@pytest.mark.processes
def test_a_run_logs_what_one_rank_logs(runs):
    """Means, sums and counts of training and evaluation; what is generated; the trained weights."""
    alone, shared = lines_of(runs / "alone"), lines_of(runs / "shared")
    assert [line["step"] for line in alone] == [line["step"] for line in shared]
    compared = 0
    for one, two in zip(alone, shared):
        assert one.keys() == two.keys()
        for name, value in one.items():
            ours = name.startswith(
                ("perf/peak", "perf/head", "perf/reference", "perf/mfu", "start/")
            )
            if ours or name.endswith("per_second") or not isinstance(value, (int, float)):
                continue
            assert two[name] == pytest.approx(value, rel=2e-5, abs=2e-5), (one["step"], name)
            compared += 1
    assert compared > 100
    examples = [
        json.loads((runs / x / "eval-examples.json").read_text()) for x in ("alone", "shared")
    ]
    assert examples[0]["examples"] == examples[1]["examples"] == 5
    first, second = (load_file(runs / x / "final/model.safetensors") for x in ("alone", "shared"))
    assert all(torch.allclose(first[key], second[key], rtol=0, atol=2e-6) for key in first)


@pytest.mark.processes
def test_a_checkpoint_goes_on_with_its_ranks_and_with_others(runs):
    """Bit for bit where as many share; else by rounding, on as many ranks and on one."""
    states = [load_file(runs / x / "final/model.safetensors") for x in ("shared", "resumed")]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    for name, metric in product(("apart", "moved"), ("loss", "num_tokens")):
        whole, after = series(runs / "shared", metric), series(runs / name, metric)
        assert sorted(after) == [3, 4]
        assert after == pytest.approx({step: whole[step] for step in after}, abs=2e-6), name
    said = ranks.group(2).said()
    told = "resumed on 2 ranks at ZeRO 3; the checkpoint is of 2 ranks with sequence_parallel=2 at ZeRO 3"
    assert told in said


@pytest.mark.processes
def test_a_checkpoint_is_evaluated_on_any_ranks(runs):
    """Bit for bit as the run logged it; by rounding on one rank, which has all tokens itself."""
    words = {"model": str(runs / "shared/checkpoint-4"), "data": None}
    other = words | {"reference": str(runs / "near")}
    found = ranks.evaluate({"own": words, "near": other}, 2)
    assert found["own"]["metrics"]["eval_loss"] == series(runs / "shared", "eval_loss")[4]
    alone = ranks.evaluate({"near": other})["near"]["metrics"]
    assert alone == pytest.approx(found["near"]["metrics"], rel=2e-5, abs=2e-5)


def test_what_the_ranks_cannot_share_is_refused(folder, monkeypatch):
    def refusal(shared: int, **sections) -> str:
        with pytest.raises(UserError) as error:
            check_run(build_config(tree_of(folder, "pairs", shared, 0, **sections), "test"))
        return str(error.value)

    told = refusal(2)
    assert "parallel.sequence_parallel=2 does not divide the 1 rank of this run" in told
    assert "start a multiple of 2 ranks (--nproc), or set it to 1" in told
    monkeypatch.setenv("WORLD_SIZE", "6")
    assert "=4 does not divide the 6 ranks of this run" in refusal(4)
    assert "=3 does not divide the 4 attention heads" in refusal(3, train={"global_batch_size": 4})
    monkeypatch.setenv("WORLD_SIZE", "8")
    told = refusal(2, train={"global_batch_size": 12})
    assert "micro_batch_size * world_size / sequence_parallel = 2 * 8 / 2 = 8; try 16" in told
    told = refusal(2, model={"attention": "eager"})
    assert "model.attention=eager cannot be honoured with parallel.sequence_parallel=2" in told
    raw = {"deepspeed": {"sequence_parallel_size": 2}}
    with pytest.raises(UserError, match="sequence_parallel_size is not DeepSpeed's to decide"):
        build_config(tree_of(folder, "pairs", parallel=raw), "test")


def test_a_recorded_run_has_whole_rows_on_ranks_that_it_does_not_divide():
    """Evaluations and replays on other ranks, one above all."""
    recorded = {"sequence_parallel": 4, "zero_stage": 3}
    for world, shared in ((1, 1), (4, 4), (6, 1), (8, 4)):
        found = data_ranks.shared_or_whole(recorded, world)
        assert found == {"sequence_parallel": shared, "zero_stage": 3}
    assert data_ranks.shared_or_whole(None, 1) == {}


def test_a_model_that_mixes_tokens_otherwise_is_refused(folder):
    config = build_config(tree_of(folder, "pairs", 2), "test")
    carries = Architecture("MambaForCausalLM", "it has layers that carry state", False, False)
    skeletons = {None: SimpleNamespace(config=transformers.LlamaConfig())}
    with pytest.raises(
        UserError, match="=2 cannot be honoured for MambaForCausalLM: it has layers"
    ):
        check_sequence_parallel(config, skeletons, {None: carries})


def test_one_of_those_that_share_tells_what_any_has_seen(monkeypatch):
    """Rows of 2 x 2 ranks: the first module whose output was not finite, the last such gradient."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(data_ranks, "_group", SimpleNamespace(rank=0, size=2))
    row = Row("a:1", {}, 0.5, [1.0], [0.0])
    seen = [("2", None, 1.0), ("0", None, 2.0), (None, "0.weight", 3.0), (None, "1.bias", 4.0)]
    of_ranks = [
        [replace(row, output=output, gradient=gradient, largest=largest)]
        for output, gradient, largest in seen
    ]
    model = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(3)))
    found = [(r.output, r.gradient, r.largest) for r in one_of_each(of_ranks, model)]
    assert found == [("0", None, 2.0), (None, "1.bias", 4.0)]


def test_one_rank_stands_for_those_that_share(monkeypatch):
    """Without a group every rank counts, and a sum is over all ranks."""
    assert data_ranks.counts() and data_ranks.data_ranks() == 1
    values = torch.tensor([1.0, math.nan])

    monkeypatch.setattr(data_ranks, "_group", SimpleNamespace(rank=1, size=2))
    assert not data_ranks.counts()
    assert data_ranks.sum_once(values).tolist() == [0.0, 0.0]
