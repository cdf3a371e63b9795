"""The whole step against plain PyTorch in fp64, and against itself however the batch is split."""

import json
import os
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("deepspeed")

from dpo_fast.cli.launch import launch_command
from dpo_fast.data.sampler import Sampler
from dpo_fast.losses import LOSSES
from tests.models import run_tree, write_architecture, write_model, write_pairs

ROOT = Path(__file__).resolve().parents[1]
PAIRS, GLOBAL = 10, 8
LOSS_CASES = {
    "sigmoid": {"type": "sigmoid", "beta": 0.3},
    "cdpo": {"type": "sigmoid", "beta": 0.3, "label_smoothing": 0.2},
    "ipo": {"type": "ipo", "beta": 0.2},
    "ipo_sum": {"type": "ipo", "beta": 0.02, "length_average": False},
    "hinge": {"type": "hinge", "beta": 0.05},
    "robust": {"type": "robust", "beta": 0.3, "label_smoothing": 0.1},
    "sigmoid_norm": {"type": "sigmoid_norm", "beta": 5.0, "label_smoothing": 0.1},
    "sft": {"type": "sft"},
    "mixture": {"type": ["sigmoid", "sft", "ipo"], "weights": [1.0, 0.4, 0.01], "beta": 0.3},
}


def plain_losses(options: dict, lw, ll, rw, rl, nw, nl) -> torch.Tensor:
    """The formulas once more, written out from the papers, as the mean over the global batch."""
    beta, eps = options.get("beta", 0.1), options.get("label_smoothing", 0.0)
    names = options["type"] if isinstance(options["type"], list) else [options["type"]]
    weights = options.get("weights", [1.0] * len(names))
    a, b = lw - rw, ll - rl
    per_token = a / nw - b / nl
    likes = {
        "sigmoid": a - b,
        "robust": a - b,
        "sigmoid_norm": per_token,
    }
    total = 0.0
    for name, weight in zip(names, weights):
        if name == "ipo":
            gap = per_token if options.get("length_average", True) else a - b
            value = ((gap - 1 / (2 * beta)) ** 2).mean()
        elif name == "hinge":
            value = torch.clamp(1 - beta * (a - b), min=0).mean()
        elif name == "sft":
            value = -lw.sum() / nw.sum()
        else:
            x = beta * likes[name]
            right, wrong = -torch.log(torch.sigmoid(x)), -torch.log(torch.sigmoid(-x))
            if name == "robust":
                value = (((1 - eps) * right - eps * wrong) / (1 - 2 * eps)).mean()
            else:
                value = ((1 - eps) * right + eps * wrong).mean()
        total = total + weight * value
    return total


def sequence_logp(model, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """Materialised logits of one sequence alone, log-softmax and gather."""
    ids = torch.tensor([prompt + completion])
    logits = model(ids).logits[0, len(prompt) - 1 : -1]
    logp = F.log_softmax(logits, dim=-1)
    return logp.gather(1, torch.tensor(completion)[:, None]).sum()


def plain_step(folder: Path, options: dict) -> tuple[float, dict]:
    """Loss and gradients of step 0 by transformers alone, in fp64, one sequence at a time."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    load = lambda name: AutoModelForCausalLM.from_pretrained(  # noqa: E731
        folder / name, dtype=torch.float64, attn_implementation="eager"
    )
    policy, reference = load("model"), load("reference-model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    values = {name: [] for name in ("lw", "ll", "rw", "rl", "nw", "nl")}
    for index in Sampler(PAIRS, GLOBAL, 4, seed=42).global_batch(0):
        row = rows[index]
        prompt = [tokenizer.bos_token_id, *encode(row["prompt"])]
        for side, letter in (("chosen", "w"), ("rejected", "l")):
            completion = [*encode(row[side]), tokenizer.eos_token_id]
            values["l" + letter].append(sequence_logp(policy, prompt, completion))
            with torch.no_grad():
                values["r" + letter].append(sequence_logp(reference, prompt, completion))
            values["n" + letter].append(torch.tensor(float(len(completion))).double())
    loss = plain_losses(options, **{name: torch.stack(v) for name, v in values.items()})
    loss.backward()
    return loss.item(), {f"model.{n}": p.grad for n, p in policy.named_parameters()}


def run_cases(folder: Path, cases: dict, ranks: int) -> dict:
    (folder / "cases.json").write_text(json.dumps(cases))
    command = [sys.executable, str(ROOT / "tests/workers/exactness.py"), str(folder), "triton"]
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    code = launch_command(ranks, command, environment)
    assert code == 0, f"the worker ended with {code}"
    return torch.load(folder / f"results-{ranks}.pt", weights_only=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exactness")
    write_model(folder / "model", seed=0)
    write_model(folder / "reference-model", seed=1)
    write_model(folder / "tied" / "model", seed=0, tied=True)
    write_pairs(folder / "pairs.jsonl", PAIRS)
    return folder


def case(folder: Path, loss: dict, **changes) -> dict:
    stage = changes.pop("stage", 0)
    model = changes.pop("model", "model")
    tree = run_tree(folder, global_pairs=GLOBAL, max_steps=1, **changes)
    tree["model"]["path"] = str(folder / model)
    tree["loss"] = loss
    tree["parallel"] = {"zero_stage": stage}
    if any(LOSSES[name].needs_reference for name in tree_names(loss)):
        tree["reference"] = {"provider": "frozen", "path": str(folder / "reference-model")}
    return tree


def tree_names(loss: dict) -> list[str]:
    return loss["type"] if isinstance(loss["type"], list) else [loss["type"]]


def assert_same(result, truth, tolerance: float, what: str) -> None:
    """Loss relative to its size; each gradient relative to the largest element of its truth."""
    loss, gradients = result
    true_loss, true_gradients = truth
    assert abs(loss - true_loss) <= tolerance * max(abs(true_loss), 1), (what, loss, true_loss)
    assert gradients.keys() == true_gradients.keys(), what
    for name, true in true_gradients.items():
        size = true.abs().max().clamp_min(1e-12)  # an adapter's first factor has none at first
        error = (gradients[name].double() - true.double()).abs().max() / size
        assert error <= tolerance, (
            f"{what}: gradient of {name} is off by {error:.2e} of its maximum"
        )


def test_every_loss_is_in_the_cases():
    assert {name for c in LOSS_CASES.values() for name in tree_names(c)} == set(LOSSES)


def test_every_loss_equals_plain_pytorch(folder):
    cases = {name: case(folder, loss, layout="shared_prefix") for name, loss in LOSS_CASES.items()}
    results = run_cases(folder, cases, 1)
    for name, loss in LOSS_CASES.items():
        assert_same(results[name], plain_step(folder, loss), 2e-5, name)


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_split_does_not_matter(folder, ranks):
    """Any micro-batch, accumulation, number of ranks, ZeRO stage, layout and implementation."""
    loss = LOSS_CASES["mixture"]
    splits = [*product((0, 1, 2, 3), (1, 4), ("padded", "shared_prefix"), ("torch",))]
    splits += [(0, 2, "packed", "torch"), (3, 1, "packed", "torch")]
    # Triton's interpreter is slow: each of its cases differs from the other in every dimension.
    splits += [(0, 4, "shared_prefix", "triton"), (3, 2, "padded", "triton")]
    cases = {
        f"zero {stage}, micro {micro}, {layout}, {implementation}": case(
            folder, loss, stage=stage, micro_pairs=micro, layout=layout,
            implementation=implementation,
        )
        for stage, micro, layout, implementation in splits
    }  # fmt: skip
    results = run_cases(folder, cases, ranks)
    truth = plain_step(folder, loss)
    for name, result in results.items():
        assert_same(result, truth, 2e-5, f"{ranks} ranks, {name}")


MODELS = {
    "llama, checkpointed": {"gradient_checkpointing": True},
    "llama, adapters": {"lora": {"r": 4, "alpha": 8}},
    "qwen3-moe, experts": {},
    "gemma2, caps and windows": {},
}


def test_no_layout_changes_the_step_of_any_model(folder):
    """Each layout under ZeRO-3 on two ranks, against padded batches on one rank without."""
    for name in MODELS:
        if not name.startswith("llama"):
            write_architecture(folder / name, name)

    def cases(stage: int, layouts: tuple[str, ...]) -> dict:
        trees = {}
        for name, options in MODELS.items():
            for layout in layouts:
                tree = case(folder, LOSS_CASES["sigmoid"], stage=stage, layout=layout)
                own = {} if name.startswith("llama") else {"path": str(folder / name)}
                tree["model"] |= options | own
                trees[f"{name}/{layout}"] = tree
        return trees

    truth = run_cases(folder, cases(0, ("padded",)), 1)
    results = run_cases(folder, cases(3, ("padded", "packed", "shared_prefix")), 2)
    for name, result in results.items():
        assert_same(result, truth[f"{name.split('/')[0]}/padded"], 1e-5, name)
