"""Losses on groups of scored completions: whole steps against plain PyTorch, whole runs, exact resume."""

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("deepspeed")

from dpo_fast.data.dataset import load_examples
from dpo_fast.data.sampler import Sampler
from dpo_fast.errors import UserError
from dpo_fast.losses import LOSSES, Preference, Totals
from dpo_fast.training.config import build_config
from dpo_fast.training.load_data import make_split
from dpo_fast.training.metrics import MetricSums
from tests.support import ranks
from tests.support.metrics import lines_of, series
from tests.support.models import run_tree, write_completions, write_groups, write_model, write_pairs
from tests.support.paths import ENVIRONMENT, ROOT
from tests.support.plain_torch import assert_same_step, token_logps
from tests.support.tokenizers import byte_tokenizer

ROWS, GLOBAL, STEPS, SEED = 20, 6, 6, 42
CASES = {
    "plackett_luce": {"type": "plackett_luce", "beta": 0.3},
    "plackett_luce, js": {
        "type": "plackett_luce", "beta": 0.3, "f_divergence_type": "js_divergence"},
    "plackett_luce, clamp": {"type": "plackett_luce", "beta": 0.3, "token_clamp": 0.5},
    "grpo": {"type": "grpo"},
    "grpo, kl": {"type": "grpo", "grpo_beta": 0.2, "epsilon": 0.3, "epsilon_high": 0.5},
    "grpo, sequence": {"type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.5},
    "dapo": {"type": "dapo", "scale_rewards": "none", "grpo_beta": 0.1},
    "mixture": {"type": ["plackett_luce", "grpo"], "weights": [1.0, 0.5], "beta": 0.3},
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`near` wrote the completions, and `far` is the reference."""
    folder = tmp_path_factory.mktemp("groups")
    for seed, name in enumerate(("model", "near", "far")):
        write_model(folder / name, seed=seed)
    write_groups(folder / "groups.jsonl", ROWS)
    write_pairs(folder / "pairs.jsonl", 4)
    write_completions(folder / "completions.jsonl", 4)
    return folder


def tree_of(folder: Path, loss: dict, **changes) -> dict:
    sections = {name: changes.pop(name, {}) for name in ("model", "data", "parallel", "reference")}
    tree = run_tree(
        folder, global_batch_size=GLOBAL, seed=SEED, **({"micro_batch_size": 3} | changes)
    )
    tree["data"]["train"] = str(folder / "groups.jsonl")
    tree["loss"] = loss
    for name, options in sections.items():
        tree[name] = tree.get(name, {}) | options
    return tree


# One step against plain PyTorch


def plain_step(folder: Path, o: dict) -> tuple[float, dict]:
    """Loss and gradients of step 0 by transformers alone, in fp64, one sequence at a time."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    models = [
        AutoModelForCausalLM.from_pretrained(
            folder / name, dtype=torch.float64, attn_implementation="eager"
        )
        for name in ("model", "near", "far")
    ]
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    lines = (folder / "groups.jsonl").read_text().splitlines()
    names = o["type"] if isinstance(o["type"], list) else [o["type"]]
    sums, counts = dict.fromkeys(names, 0.0), {"plackett_luce": 0, "grpo": 0, "dapo": 0}
    for index in Sampler(ROWS, GLOBAL, 3, seed=SEED).global_batch(0):
        row = json.loads(lines[index])
        prompt = [tokenizer.bos_token_id, *encode(row["prompt"])]
        tokens = []
        for text in row["completions"]:
            completion = [*encode(text), tokenizer.eos_token_id]
            own, *others = (token_logps(model, prompt, completion)[0] for model in models)
            tokens.append((own, *(x.detach() for x in others)))
        scores = torch.tensor(row["scores"]).double()
        counts["plackett_luce"] += 1
        counts["grpo"] += len(tokens)
        counts["dapo"] += sum(len(own) for own, *_ in tokens)
        for name in names:
            of_group = ranking if name == "plackett_luce" else policy_gradient
            sums[name] = sums[name] + of_group(o, name, tokens, scores)
    weights = o.get("weights", [1.0])
    loss = sum(w * sums[name] / counts[name] for w, name in zip(weights, names))
    loss.backward()
    return loss.item(), {f"model.{n}": p.grad for n, p in models[0].named_parameters()}


def ranking(o: dict, name: str, tokens: list, scores: torch.Tensor):
    bound = o.get("token_clamp", 1e9)
    ratios = torch.stack([(own - ref).clamp(-bound, bound).sum() for own, _, ref in tokens])
    if "f_divergence_type" in o:
        ratios = torch.log(2 * torch.sigmoid(ratios))
    x = o["beta"] * ratios
    total = 0.0
    for i, score in enumerate(scores):
        left = torch.cat([x[i : i + 1], x[scores < score]])
        total = total - torch.log(torch.exp(x[i]) / torch.exp(left).sum())
    return total


def policy_gradient(o: dict, name: str, tokens: list, scores: torch.Tensor):
    gains = scores - scores.mean()
    if o.get("scale_rewards", "group") == "group":
        gains = gains / (scores.std() + 1e-4)
    low = 1 - o.get("epsilon", 0.2)
    high = 1 + o.get("epsilon_high", o.get("epsilon", 0.2))
    total = 0.0
    for gain, (own, old, ref) in zip(gains, tokens):
        weight = torch.exp(own - old)
        if o.get("importance_sampling_level") == "sequence":
            weight = torch.exp((own - old).mean()).expand(len(own))
        cost = -torch.minimum(weight * gain, weight.clamp(low, high) * gain)
        cost = cost + o.get("grpo_beta", 0.0) * (torch.exp(ref - own) - (ref - own) - 1)
        total = total + (cost.sum() if name == "dapo" else cost.mean())
    return total


def step_case(folder: Path, loss: dict, stage: int = 0, **changes) -> dict:
    names = loss["type"] if isinstance(loss["type"], list) else [loss["type"]]
    compares = "plackett_luce" in names or loss.get("grpo_beta")
    reference = {"provider": "frozen", "path": str(folder / "far")} if compares else {}
    if set(names) != {"plackett_luce"}:
        reference["old_path"] = str(folder / "near")
    return tree_of(
        folder, loss, max_steps=1, parallel={"zero_stage": stage}, reference=reference, **changes
    )


@pytest.mark.processes
def test_every_loss_equals_plain_pytorch(folder):
    cases = {name: step_case(folder, loss, layout="shared_prefix") for name, loss in CASES.items()}
    results = ranks.first_steps(cases)
    for name, loss in CASES.items():
        assert_same_step(results[name], plain_step(folder, loss), 2e-5, name)
    tried = {
        n for o in CASES.values() for n in (o["type"] if type(o["type"]) is list else [o["type"]])
    }
    assert tried == {name for name, spec in LOSSES.items() if spec.grouped}


@pytest.mark.processes
def test_the_split_does_not_matter(folder):
    """Any micro-batch, number of ranks, ZeRO stage and layout; a stored reference and a live one."""
    loss = {
        "type": ["grpo", "dapo", "plackett_luce"],
        "weights": [1.0, 0.5, 0.3],
        "beta": 0.3,
        "grpo_beta": 0.2,
    }
    one = [
        CASES["mixture"]
        | {"type": [name], "weights": [1.0]}
        | {k: loss[k] for k in ("beta", "grpo_beta")}
        for name in loss["type"]
    ]
    parts = [
        plain_step(
            folder,
            {k: v for k, v in o.items() if k != "grpo_beta" or o["type"] != ["plackett_luce"]},
        )
        for o in one
    ]
    truth = (
        sum(w * x for w, (x, _) in zip(loss["weights"], parts)),
        {n: sum(w * g[n] for w, (_, g) in zip(loss["weights"], parts)) for n in parts[0][1]},
    )
    stored = {
        "provider": "cached",
        "per_token": True,
        "path": str(folder / "far"),
        "old_path": str(folder / "near"),
    }
    for count, splits in (
        (1, [(0, 1, "padded", {}), (0, 6, "packed", stored)]),
        (2, [(3, 1, "shared_prefix", {}), (2, 3, "padded", stored)]),
    ):
        cases = {}
        for stage, micro, layout, reference in splits:
            tree = step_case(folder, loss, stage, micro_batch_size=micro, layout=layout)
            tree["reference"] |= reference
            cases[f"{count} ranks, zero {stage}, micro {micro}, {layout}"] = tree
        for name, result in ranks.first_steps(cases, count).items():
            assert_same_step(result, truth, 1e-5, name)


# Whole runs


@pytest.fixture(scope="module")
def runs(folder):
    """All runs; the one that resumes starts from a copy of a checkpoint at step 3."""
    common = {"max_steps": STEPS, "layout": "shared_prefix", "parallel": {"zero_stage": 0}}

    def tree(name, loss, **changes):
        options = copy.deepcopy(common) | changes
        return tree_of(folder, loss, output_dir=str(folder / name), **options)

    grpo = {"type": "grpo", "grpo_beta": 0.1}
    tokens = {"provider": "cached", "per_token": True}
    trees = {
        "ranked": tree("ranked", {"type": "plackett_luce", "beta": 0.3}, data={"eval_rows": 4}),
        "scored": tree("scored", grpo, data={"eval_rows": 4}, save_steps=3, reference=tokens),
        "free": tree(
            "free",
            {"type": "dapo"},
            micro_batch_size=None,
            tokens_per_batch=400,
            group_prompts=True,
        ),
        "lora": tree(
            "lora",
            grpo,
            model={"lora": {"r": 4, "alpha": 8}},
            parallel={"zero_stage": 3},
            reference={"provider": "adapter_off"},
        ),
        "followed": tree(
            "followed", grpo, reference={"provider": "ema", "mixup_alpha": 1.0, "sync_steps": 2}
        ),
        "stream": tree(
            "stream",
            {"type": "plackett_luce"},
            group_prompts=True,
            data={"streaming": True, "stream_buffer": 7},
            reference={"provider": "frozen"},
        ),
    }
    ranks.train(list(trees.values()))
    again = copy.deepcopy(trees["scored"])
    again["train"] |= {"output_dir": str(folder / "again"), "resume_from_checkpoint": True}
    shutil.copytree(folder / "scored" / "checkpoint-3", folder / "again" / "checkpoint-3")
    ranks.train([again])
    return trees


@pytest.mark.processes
def test_metrics_of_groups(folder, runs):
    common = (
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "rewards/accuracies",
        "logps/chosen",
        "logits/rejected",
        "reward",
        "reward_std",
        "frac_reward_zero_std",
        "mean_token_accuracy",
    )
    clipping = ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean")
    for run, more in (("ranked", ()), ("scored", (*clipping, "kl")), ("free", clipping)):
        for line in (each for each in lines_of(folder / run) if {"loss", "eval_loss"} & set(each)):
            prefix = "eval_" if "eval_loss" in line else ""
            missing = [name for name in (*common, *more) if f"{prefix}{name}" not in line]
            assert not missing, (run, missing)
            assert ("kl" in line) == ("kl" in more and not prefix)
    first = lines_of(folder / "scored")[1]
    assert first["kl"] == pytest.approx(0, abs=1e-6) and first["clip_ratio/region_mean"] == 0
    last = lines_of(folder / "scored")[-1]
    assert last["eval_kl"] > 1e-4
    rewards = series(folder / "ranked", "eval_rewards/accuracies")
    assert rewards[0] == 0.5


@pytest.mark.processes
def test_they_learn(folder, runs):
    """At first the loss of a ranking is that of a coin; at the end the order is kept more often."""
    ranked = series(folder / "ranked", "loss")
    assert ranked[STEPS] < ranked[1] - 0.05
    for run in ("ranked", "scored", "free", "lora", "stream"):
        found = series(folder / run, "rewards/accuracies")
        assert max(list(found.values())[-2:]) > 0.55, (run, found)


@pytest.mark.processes
def test_the_first_loss_of_a_ranking_is_known(folder, runs):
    """Where policy and reference are one: the sum over completions of log(1 + how many are worse)."""
    import math

    tree = tree_of(folder, {"type": "plackett_luce"}, data={"eval_rows": 4})
    rows = load_examples(build_config(tree, "t").data, byte_tokenizer(bos=True), split="train")
    batch = Sampler(len(rows), GLOBAL, 3, seed=SEED).global_batch(0)
    total = sum(
        math.log(1 + sum(other < score for other in rows[row]["scores"]))
        for row in batch
        for score in rows[row]["scores"]
    )
    assert series(folder / "ranked", "loss")[1] == pytest.approx(total / GLOBAL, abs=1e-6)


@pytest.mark.processes
def test_resume_is_bitwise(folder, runs):
    from safetensors.torch import load_file

    for metric in ("loss", "kl", "clip_ratio/region_mean", "rewards/chosen"):
        expected, found = series(folder / "scored", metric), series(folder / "again", metric)
        assert set(found) >= {4, 5, 6}
        assert found == {step: expected[step] for step in found}, metric
    a, b = (
        load_file(folder / name / "final" / "model.safetensors") for name in ("scored", "again")
    )
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.processes
def test_a_reference_that_follows_is_followed(folder, runs):
    """With mixup_alpha=1 it is copied every other step, and the divergence from it is 0 right after."""
    kl = series(folder / "followed", "kl")
    assert max(kl[1], kl[3], kl[5]) < 1e-6 < 1e-5 < min(kl[2], kl[4], kl[6])


@pytest.mark.processes
def test_what_wrote_the_completions_is_stored_once(folder, runs):
    """Where the reference is the policy at its start, one artefact serves for both."""
    import pandas

    def stored(name):
        return sorted(folder.joinpath(name, "reference").glob("*/_manifest.json"))

    assert len(stored("scored")) == 2  # train and eval
    assert len(stored("free")) == 1 and len(stored("lora")) == 1
    table = pandas.read_parquet(stored("free")[0].parent)
    assert len(table) == ROWS
    row = table.iloc[0]
    lengths = [len(each) for each in row["completions_token_logps"]]
    assert lengths == row["completions_tokens"].tolist()
    for total, each in zip(row["completions_logps"], row["completions_token_logps"]):
        assert total == pytest.approx(each.sum(), rel=1e-5)


@pytest.mark.processes
def test_the_command_stores_it_beforehand(folder, tmp_path):
    """`dpo-fast reference` computes what wrote the completions; a run of the same folder finds it."""
    plain = config(folder, {"type": "grpo"}, output_dir=str(tmp_path / "run"))
    (old,) = plain.stored_models
    assert (old.path, old.per_token) == (None, True)
    both = config(
        folder,
        {"type": "grpo", "grpo_beta": 0.1},
        reference={"provider": "cached", "per_token": True, "path": str(folder / "far")},
    )
    assert [each.path for each in both.stored_models] == [str(folder / "far"), None]
    same = config(
        folder,
        {"type": "grpo", "grpo_beta": 0.1},
        reference={"provider": "cached", "per_token": True},
    )
    assert same.stored_models == [same.old_model] == [same.reference.model]
    tree = tree_of(folder, {"type": "grpo"}, output_dir=str(tmp_path / "run"))
    (tmp_path / "run.yaml").write_text(json.dumps(tree))
    arguments = ["reference", str(tmp_path / "run.yaml")]
    cases = json.dumps([{"arguments": arguments}, {"arguments": arguments, "scoring": False}])
    command = [sys.executable, str(ROOT / "tests/support/workers/reference.py"), cases]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    for expected in ("computed at", "was there"):
        assert f"train: {ROWS} groups, {expected}" in done.stdout


# What is refused


def config(folder: Path, loss: dict, **changes):
    return build_config(tree_of(folder, loss, **changes), "test")


def split_of(run):
    tokenizer = byte_tokenizer(bos=True)
    return make_split(
        run, tokenizer, "train", load_examples(run.data, tokenizer, split="train"), True
    )


def test_data_and_losses_go_together(folder):
    with pytest.raises(
        UserError,
        match=r"loss.type=sigmoid does not go by scores.*groups.jsonl:1; set loss.type to plac",
    ):
        split_of(config(folder, {"type": "sigmoid"}))
    for file, rows in (("pairs", "pairs"), ("completions", "completions")):
        with pytest.raises(
            UserError, match=f"loss.type=grpo goes by the scores.*holds {rows}, the first"
        ):
            data = {"train": str(folder / f"{file}.jsonl")}
            split_of(config(folder, {"type": "grpo"}, data=data))
    with pytest.raises(UserError, match="reference.provider=columns takes sums of pairs or compl"):
        split_of(config(folder, {"type": "plackett_luce"}, reference={"provider": "columns"}))


REFUSED = {
    "old_path": (
        {"type": "plackett_luce"},
        {"reference": {"old_path": "x"}},
        "reference.old_path=x is not used by loss.type=plackett_luce",
    ),
    "sums alone": (
        {"type": "grpo", "grpo_beta": 0.1},
        {},
        "loss.grpo_beta compare with the reference token by token: set reference.per_token",
    ),
    "no reference": (
        {"type": "grpo", "grpo_beta": 0.1},
        {"reference": {"provider": "none"}},
        "reference.provider=none, but loss.type=grpo compares with a reference",
    ),
    "stream": (
        {"type": "grpo"},
        {"data": {"streaming": True}, "max_steps": 3},
        "data.streaming=true, but loss.type=grpo needs the log-probs that the completions",
    ),
    "budget": (
        {"type": "plackett_luce"},
        {
            "data": {"streaming": True},
            "max_steps": 3,
            "micro_batch_size": None,
            "tokens_per_batch": 4000,
            "reference": {"provider": "frozen"},
        },
        "tokens_per_batch=4000 may not hold every row of a stream of groups",
    ),
    "sum option": (
        {"type": "grpo", "token_clamp": 0.5},
        {},
        "loss.token_clamp=0.5 is not used by grpo",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_options_that_cannot_be_honoured_are_named(folder, case):
    loss, changes, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        config(folder, loss, **changes)


def test_totals_and_metrics_of_one_batch(folder):
    split = split_of(config(folder, {"type": "grpo"}, layout="padded"))
    lengths = split.lengths.take([1, 2])
    assert split.totals([1, 2]) == Totals(
        2, 0, len(lengths.answers_S), int(lengths.answers_S.sum())
    )
    rows = [split.examples[ROWS - 1], split.examples[0]]  # the scores of the first are all one
    batch = split.collate(rows, [0, 1])
    sums, zeros = MetricSums(torch.device("cpu")), torch.zeros(len(batch.lengths_S))
    rewards = batch.scores_S.clone()
    sums.add(Preference(torch.tensor(0.5), zeros, rewards), {}, batch)
    sums.step()
    found = sums.read()
    assert found["frac_reward_zero_std"] == 0.5 and found["rewards/accuracies"] == 1
    assert found["rewards/chosen"] == max(rows[1]["scores"])
    assert found["rewards/rejected"] == min(rows[1]["scores"])
    spread = torch.tensor(rows[1]["scores"]).std().item() / 2
    assert found["reward_std"] == pytest.approx(spread, rel=1e-6)


def test_a_renamed_column_that_groups_do_not_have_is_named(folder):
    with pytest.raises(
        UserError, match="data.columns.margin='prompt' is not used: the row is a group of"
    ):
        split_of(config(folder, {"type": "grpo"}, data={"columns": {"margin": "prompt"}}))
    split_of(config(folder, {"type": "grpo"}, data={"columns": {"completions": "completions"}}))
