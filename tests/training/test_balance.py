"""The balancing loss of experts: transformers' own, over the global batch, however that is split."""

import copy
import json

import pytest
import torch

pytest.importorskip("deepspeed")

from dpo_fast.data.sampler import Sampler
from tests.support import ranks
from tests.support.models import changed, run_tree, write_architecture, write_pairs
from tests.support.plain_torch import assert_same_step, token_logps

PAIRS, GLOBAL, WEIGHT = 10, 8, 0.3
NAME = "qwen3-moe, experts"
CASES = {  # ranks: name: (stage, micro-batch, layout, checkpointing)
    1: {
        "accumulated": (0, 2, "padded", False),
        "at once": (0, 8, "shared_prefix", False),
        "stage 3, recomputed": (3, 4, "packed", True),
    },
    2: {
        "one by one": (3, 1, "shared_prefix", False),
        "a micro-batch each": (2, 4, "padded", False),
        "stage 3, recomputed": (3, 2, "packed", True),
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("balance")
    write_architecture(folder / "model", NAME)
    write_pairs(folder / "pairs.jsonl", PAIRS)
    return folder


def case(folder, stage: int, micro: int, layout: str, recomputed: bool, weight: float = WEIGHT):
    tree = run_tree(
        folder, global_batch_size=GLOBAL, micro_batch_size=micro, max_steps=1, layout=layout
    )
    tree["model"] |= {"gradient_checkpointing": recomputed, "router_aux_loss_coef": weight}
    return tree | {"loss": {"type": "sft"}, "parallel": {"zero_stage": stage}}


def plain_step(folder) -> tuple[float, dict]:
    """Step 0 by transformers alone, in fp64; every sequence without its last token."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

    model = AutoModelForCausalLM.from_pretrained(
        folder / "model",
        dtype=torch.float64,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    chosen, sequences = [], []
    for index in Sampler(PAIRS, GLOBAL, 4, seed=42).global_batch(0):
        prompt = [tokenizer.bos_token_id, *encode(rows[index]["prompt"])]
        for side in ("chosen", "rejected"):
            completion = [*encode(rows[index][side]), tokenizer.eos_token_id]
            sequences.append(prompt + completion[:-1])
            if side == "chosen":
                chosen.append(token_logps(model, prompt, completion)[0])
    logits = [
        model(torch.tensor([ids]), output_router_logits=True).router_logits for ids in sequences
    ]
    config = model.config
    balance = load_balancing_loss_func(
        tuple(map(torch.cat, zip(*logits))), config.num_experts, config.num_experts_per_tok
    )
    loss = -torch.cat(chosen).mean() + WEIGHT * balance
    loss.backward()
    return loss.item(), {f"model.{n}": p.grad for n, p in model.named_parameters()}


@pytest.mark.processes
@pytest.mark.parametrize("count", CASES)
def test_it_is_that_of_transformers_over_the_global_batch(folder, count):
    cases = {name: case(folder, *options) for name, options in CASES[count].items()}
    truth = plain_step(folder)
    for name, result in ranks.first_steps(cases, count).items():
        assert_same_step(result, truth, 2e-5, f"{count} ranks, {name}")


@pytest.mark.processes
def test_ranks_that_share_a_row_have_parts_of_it(folder):
    """Slices of one micro-batch: the routers of a rank see the tokens of its slice."""
    cases = {}
    for name, options in (
        ("recomputed", (3, 2, "packed", True)),
        ("at once", (0, 8, "padded", False)),
    ):
        cases[name] = case(folder, *options)
        cases[name]["parallel"]["sequence_parallel"] = 2
    truth = plain_step(folder)
    for name, result in ranks.first_steps(cases, 2).items():
        assert_same_step(result, truth, 2e-5, name)


@pytest.mark.processes
def test_a_loss_in_two_passes_has_it_too(folder):
    """aot sorts the whole batch: the balancing loss adds the same to it as to any other loss."""
    trees = {}
    for weight in (0.0, WEIGHT):
        for loss in ("aot", "sft"):
            micro, layout = (2, "padded") if loss == "aot" else (8, "packed")
            tree = case(folder, 0, micro, layout, False, weight)
            trees[f"{loss} {weight}"] = tree | {
                "loss": {"type": ["aot", "sft"], "weights": [1.0, 0.0]}
                if loss == "aot"
                else {"type": "sft"},
                "reference": {"provider": "frozen", "path": str(folder / "model")}
                if loss == "aot"
                else {},
            }
    steps = ranks.first_steps(trees)

    def added(loss: str) -> tuple[float, dict]:
        (with_it, more), (without, fewer) = (steps[f"{loss} {w}"] for w in (WEIGHT, 0.0))
        return with_it - without, {name: more[name] - fewer[name] for name in more}

    assert added("sft")[0] > WEIGHT  # two choices of every token: 2 is balance
    assert_same_step(added("aot"), added("sft"), 1e-4, "what it adds")


@pytest.mark.processes
def test_routers_are_in_the_metrics_of_training_and_evaluation(folder, tmp_path):
    tree = case(folder, 0, 4, "shared_prefix", False)
    tree["train"] |= {"max_steps": 2, "eval_steps": 1}
    tree["data"] |= {"eval": str(write_pairs(tmp_path / "held-out.jsonl", 4, seed=1))}
    quiet = changed(copy.deepcopy(tree), tmp_path / "0", model={"router_aux_loss_coef": 0.0})
    ranks.train([changed(tree, tmp_path / "1"), quiet])
    runs = [
        [json.loads(x) for x in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in "01"
    ]
    names = {"aux_loss", *(f"router/{x}" for x in ("load_max", "unused", "entropy", "dropped"))}
    for lines in runs:
        trained = [line for line in lines if "loss" in line]
        evaluated = [line for line in lines if "eval_loss" in line]
        assert len(trained) == 2 and len(evaluated) == 3
        assert all(names <= line.keys() for line in trained)
        assert all({f"eval_{name}" for name in names} <= line.keys() for line in evaluated)
        assert all(1 <= line["router/load_max"] <= 4 for line in trained)
    asked = {"mine": {"model": str(tmp_path / "1"), "data": None}}
    found = ranks.evaluate(asked)["mine"]["metrics"]
    last = [line for line in runs[1] if "eval_loss" in line][-1]
    assert {name: last[f"eval_{name}"] for name in names} == {n: found[f"eval_{n}"] for n in names}
    first = [next(line for line in lines if "loss" in line) for lines in runs]
    assert first[0]["loss"] == pytest.approx(
        first[1]["loss"], abs=1e-6
    )  # the preference loss alone
    assert first[0]["aux_loss"] == pytest.approx(first[1]["aux_loss"], abs=1e-6)
