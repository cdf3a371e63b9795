"""Steps on rows that have prompts and answers in common, against each example alone."""

import itertools
import json

import pytest

pytest.importorskip("deepspeed")

from tests.support import ranks
from tests.support.models import run_tree, write_model
from tests.support.plain_torch import assert_same_step

PROMPTS = ["what is it?", "name two birds that sing in the morning"]
ANSWERS = [" a bird", " a bird of prey", " a bird of song", " no"]
SYSTEM = "here is a long beginning that all prompts have in common: "  # more than 32 tokens


def write_rows(folder) -> None:
    texts = {"pairs": [], "completions": [], "groups": []}
    for prompt in PROMPTS:
        prompt = SYSTEM + prompt
        for chosen, rejected in itertools.combinations(ANSWERS, 2):
            row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
            texts["pairs"].append(row)
        for number, answer in enumerate([*ANSWERS, ANSWERS[0]]):
            row = {"prompt": prompt, "completion": answer, "label": number % 2 == 0}
            texts["completions"].append(row)
        for some in (ANSWERS[:3], ANSWERS[1:]):
            texts["groups"].append(
                {"prompt": prompt, "completions": some, "scores": [2.0, 1.0, 0.0]}
            )
    for name, rows in texts.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("twice")
    write_model(folder / "model", seed=0)
    write_model(folder / "other", seed=1)
    write_rows(folder)
    return folder


STORED = {"provider": "cached", "per_token": True}
CASES = {  # data: losses and what goes with them
    "pairs, frozen": ("pairs", {"type": ["sigmoid", "sft"], "weights": [1.0, 0.3]}, {}),
    "pairs, stored": ("pairs", {"type": "sigmoid", "ld_alpha": 0.3}, {"reference": STORED}),
    "pairs, coupled": ("pairs", {"type": "aot"}, {}),
    "pairs, wpo, checkpointed": (
        "pairs",
        {"type": "sigmoid", "use_weighting": True},
        {"model": {"gradient_checkpointing": True}},
    ),
    "pairs, adapters": ("pairs", {"type": "sigmoid"}, {"model": {"lora": {"r": 4, "alpha": 8}}}),
    "completions": ("completions", {"type": "kto"}, {}),
    "groups": ("groups", {"type": "plackett_luce"}, {}),
    "groups, tokens": ("groups", {"type": "grpo", "grpo_beta": 0.1}, {"reference": STORED}),
}


def case(folder, name: str, **train) -> dict:
    data, loss, more = CASES[name]
    stage = train.pop("stage", 0)
    count = len((folder / f"{data}.jsonl").read_text().splitlines())
    train = {"group_prompts": True, "global_batch_size": count, "max_steps": 1} | train
    if "tokens_per_batch" in train:
        train["micro_batch_size"] = None
    tree = run_tree(folder, **train)
    tree["data"] |= {"train": str(folder / f"{data}.jsonl")}
    tree["loss"] = {"beta": 0.3} | loss
    tree["parallel"] = {"zero_stage": stage}
    tree["reference"] = {"provider": "frozen"} | more.get("reference", {})
    tree["reference"]["path"] = str(folder / "other")
    tree["model"] |= more.get("model", {})
    return tree


@pytest.mark.processes
def test_what_comes_again_changes_no_step(folder):
    """Whole global batches in one micro-batch or a few, on one rank and on two with ZeRO-3."""
    truth = ranks.first_steps(
        {name: case(folder, name, layout="padded", micro_batch_size=1) for name in CASES}
    )
    splits = {name: {"layout": "shared_prefix", "micro_batch_size": 20} for name in CASES}
    few = ("pairs, frozen", "completions", "groups, tokens")
    splits |= {f"{name}/padded": {"layout": "padded", "micro_batch_size": 20} for name in few}
    splits |= {f"{name}/packed": {"layout": "packed", "micro_batch_size": 20} for name in few}
    splits |= {f"{name}/tokens": {"layout": "packed", "tokens_per_batch": 700} for name in few}
    one = {name: case(folder, name.split("/")[0], **split) for name, split in splits.items()}
    two = {
        f"{name}/two ranks": case(
            folder,
            name,
            layout="shared_prefix",
            micro_batch_size=6 if "pairs" in name else 2,
            stage=3,
        )
        for name in CASES
    }
    results = ranks.first_steps(one) | ranks.first_steps(two, 2)
    for name, result in results.items():
        assert_same_step(result, truth[name.split("/")[0]], 1e-5, name)
