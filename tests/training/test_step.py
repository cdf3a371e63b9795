"""The whole step against plain PyTorch in fp64, and against itself however the batch is split."""

import json
from itertools import product
from pathlib import Path

import pytest
import torch

pytest.importorskip("deepspeed")

from dpo_fast.data.sampler import Sampler
from dpo_fast.losses import LOSSES
from tests.support import ranks
from tests.support.models import run_tree, write_architecture, write_model, write_pairs
from tests.support.plain_torch import assert_same_step, token_logps

PAIRS, GLOBAL = 10, 8
LOSS_CASES = {
    "sigmoid": {"type": "sigmoid", "beta": 0.3},
    "cdpo": {"type": "sigmoid", "beta": 0.3, "label_smoothing": 0.2},
    "ipo": {"type": "ipo", "beta": 0.2},
    "ipo_sum": {"type": "ipo", "beta": 0.02, "length_average": False},
    "hinge": {"type": "hinge", "beta": 0.05},
    "robust": {"type": "robust", "beta": 0.3, "label_smoothing": 0.1},
    "exo_pair": {"type": "exo_pair", "beta": 0.3, "label_smoothing": 0.01},
    "nca_pair": {"type": "nca_pair", "beta": 0.3},
    "bco_pair": {"type": "bco_pair", "beta": 0.3},
    "sppo_hard": {"type": "sppo_hard", "beta": 0.2},
    "aot": {"type": "aot", "beta": 0.3, "label_smoothing": 0.1},
    "aot_unpaired": {"type": "aot_unpaired", "beta": 0.3},
    "apo_zero": {"type": "apo_zero", "beta": 0.3},
    "apo_down": {"type": "apo_down", "beta": 0.3},
    "discopop": {"type": "discopop", "beta": 0.03},
    "sigmoid_norm": {"type": "sigmoid_norm", "beta": 5.0, "label_smoothing": 0.1},
    "dpop": {"type": "dpop", "beta": 0.1, "dpop_lambda": 2.0},
    "sft": {"type": "sft"},
    "simpo": {"type": "simpo", "beta": 2.0, "simpo_gamma": 0.7},
    "cpo": {"type": "cpo", "beta": 0.2, "cpo_alpha": 0.5},
    "orpo": {"type": "orpo", "beta": 0.4},
    "slic": {"type": "slic", "slic_delta": 3.0, "slic_lambda": 0.2},
    "mixture": {"type": ["sigmoid", "sft", "ipo"], "weights": [1.0, 0.4, 0.01], "beta": 0.3},
    "aot, sft": {"type": ["aot", "sft", "ipo"], "weights": [1.0, 0.5, 0.01], "beta": 0.3},
    "js": {"type": "sigmoid", "beta": 0.3, "f_divergence_type": "js_divergence"},
    "alpha": {"type": "hinge", "f_divergence_type": "alpha_divergence", "beta": 0.01,
              "f_alpha_divergence_coef": 0.8},
    "forward": {"type": "sigmoid", "beta": 0.01, "f_divergence_type": "forward_kl"},
    "ld": {"type": ["sigmoid", "sft"], "beta": 0.3, "ld_alpha": 0.3},
    "ld, policy": {"type": "sigmoid", "beta": 0.3, "ld_alpha": 0.3, "ld_reference": False},
    "clamp": {"type": ["sigmoid", "sft"], "beta": 0.3, "token_clamp": 0.5},
    "free": {"type": "sigmoid", "beta": 0.1, "reference_free": True},
    "wpo": {"type": ["sigmoid", "sft"], "beta": 0.3, "use_weighting": True},
    "wpo, clamped": {"type": "sigmoid", "beta": 0.3, "use_weighting": True, "weighting_clamp": 0.01},
}  # fmt: skip


def plain_value(name: str, o: dict, lw, ll, a, b, d, nw, nl) -> torch.Tensor:
    """One loss of every pair, from the papers' formulas; a, b log-ratios, d the margin of scores."""
    beta, eps = o.get("beta", 0.1), o.get("label_smoothing", 0.0)
    S = torch.sigmoid
    LS = lambda x: -torch.logaddexp(torch.zeros_like(x), -x)  # noqa: E731
    both = lambda x: -(1 - eps) * LS(x) - eps * LS(-x)  # noqa: E731
    relu = lambda x: (x + x.abs()) / 2  # noqa: E731
    rank = lambda x: x[x.argsort()]  # noqa: E731
    p, q = lw / nw, ll / nl
    return {
        "sigmoid": lambda: both(beta * d),
        "ipo": lambda: (
            (((a / nw - b / nl) if o.get("length_average", True) else d) - 1 / (2 * beta)) ** 2
        ),
        "hinge": lambda: relu(1 - beta * d),
        "robust": lambda: (-(1 - eps) * LS(beta * d) + eps * LS(-beta * d)) / (1 - 2 * eps),
        "exo_pair": lambda: (
            S(beta * d) * torch.log(S(beta * d) / (1 - eps))
            + S(-beta * d) * torch.log(S(-beta * d) / eps)
        ),
        "nca_pair": lambda: -LS(beta * a) - LS(-beta * a) / 2 - LS(-beta * b) / 2,
        "bco_pair": lambda: -LS(beta * a) - LS(-beta * b),
        "sppo_hard": lambda: (a - 1 / (2 * beta)) ** 2 + (b + 1 / (2 * beta)) ** 2,
        "aot": lambda: both(beta * (rank(lw - ll) - rank((lw - a) - (ll - b)))),
        "aot_unpaired": lambda: both(beta * (rank(a) - rank(b))),
        "apo_zero": lambda: 1 - S(beta * a) + S(beta * b),
        "apo_down": lambda: S(beta * a) + 1 - S(beta * (a - b)),
        "discopop": lambda: (
            -LS(beta * d) * (1 - S(beta * d / 0.05)) + torch.exp(-beta * d) * S(beta * d / 0.05)
        ),
        "sigmoid_norm": lambda: both(beta * (a / nw - b / nl)),
        "dpop": lambda: both(beta * (d - o.get("dpop_lambda", 50.0) * relu(-a))),
        "simpo": lambda: both(beta * (p - q) - o.get("simpo_gamma", 0.5)),
        "cpo": lambda: both(beta * (lw - ll)),
        "orpo": lambda: (
            -beta * LS(torch.log(p.exp() / (1 - p.exp())) - torch.log(q.exp() / (1 - q.exp())))
        ),
        "slic": lambda: relu(o.get("slic_delta", 1.0) - lw + ll),
    }[name]()


SFT_TERMS = {
    "sft": lambda o: 1.0,
    "orpo": lambda o: 1.0,
    "cpo": lambda o: o.get("cpo_alpha", 1.0),
    "slic": lambda o: o.get("slic_lambda", 0.1),
}
SCORES = {
    "reverse_kl": lambda r, alpha: r,
    "forward_kl": lambda r, alpha: 1 - torch.exp(-r),
    "js_divergence": lambda r, alpha: torch.log(2 * torch.exp(r) / (1 + torch.exp(r))),
    "alpha_divergence": lambda r, alpha: (torch.exp((alpha - 1) * r) - 1) / (alpha - 1),
}


def plain_losses(o: dict, pairs: list[dict]) -> torch.Tensor:
    """The loss of a global batch from the tokens of its pairs: {w, l} to policy, reference and
    log sum p^2 of every token."""
    sums = {name: [] for name in ("lw", "ll", "a", "b", "nw", "nl", "plain", "weight")}
    for pair in pairs:
        shorter = min(len(pair[side]["policy"]) for side in "wl")
        weight = 1.0
        for side, total, ratio, count in (("w", "lw", "a", "nw"), ("l", "ll", "b", "nl")):
            policy, reference = pair[side]["policy"], pair[side]["reference"]
            weight = weight * (policy - pair[side]["p2"]).mean().exp().detach()
            if side == "w":
                sums["plain"].append(policy.sum())
            if (clamp := o.get("token_clamp")) is not None:
                policy = reference + torch.clamp(policy - reference, -clamp, clamp)
            share = torch.ones(len(policy), dtype=torch.float64)
            share[shorter:] = o.get("ld_alpha", 1.0)
            compared = reference if o.get("ld_reference") is False else reference * share
            compared = compared * (0.0 if o.get("reference_free") else 1.0)
            sums[total].append((policy * share).sum())
            sums[ratio].append((policy * share).sum() - compared.sum())
            sums[count].append(torch.tensor(float(len(policy))).double())
        sums["weight"].append(torch.as_tensor(weight).clamp(max=o.get("weighting_clamp", 9e9)))
    v = {name: torch.stack(values) for name, values in sums.items()}
    score = SCORES[o.get("f_divergence_type", "reverse_kl")]
    alpha = o.get("f_alpha_divergence_coef")
    d = score(v["a"], alpha) - score(v["b"], alpha)
    row = v["weight"] if o.get("use_weighting") else torch.ones(len(pairs), dtype=torch.float64)
    total = 0.0
    for name, weight in zip(tree_names(o), o.get("weights", [1.0] * 9)):
        if name in SFT_TERMS:
            total = total - weight * SFT_TERMS[name](o) * (row * v["plain"]).sum() / v["nw"].sum()
        if name != "sft":
            columns = [v[column] for column in ("lw", "ll", "a", "b")]
            value = plain_value(name, o, *columns, d, v["nw"], v["nl"])
            total = total + weight * (row * value).mean()
    return total


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
    pairs = []
    for index in Sampler(PAIRS, GLOBAL, 4, seed=42).global_batch(0):
        row, pair = rows[index], {}
        prompt = [tokenizer.bos_token_id, *encode(row["prompt"])]
        for side, letter in (("chosen", "w"), ("rejected", "l")):
            completion = [*encode(row[side]), tokenizer.eos_token_id]
            logps, p2 = token_logps(policy, prompt, completion)
            with torch.no_grad():
                compared, _ = token_logps(reference, prompt, completion)
            pair[letter] = {"policy": logps, "reference": compared, "p2": p2}
        pairs.append(pair)
    loss = plain_losses(options, pairs)
    loss.backward()
    return loss.item(), {f"model.{n}": p.grad for n, p in policy.named_parameters()}


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
    tree = run_tree(folder, global_batch_size=GLOBAL, max_steps=1, **changes)
    tree["model"]["path"] = str(folder / model)
    tree["loss"] = loss
    tree["parallel"] = {"zero_stage": stage}
    if any(LOSSES[n].needs_reference for n in tree_names(loss)) and "reference_free" not in loss:
        tree["reference"] = {"provider": "frozen", "path": str(folder / "reference-model")}
    return tree


def tree_names(loss: dict) -> list[str]:
    return loss["type"] if isinstance(loss["type"], list) else [loss["type"]]


def test_every_loss_is_in_the_cases():
    """Every loss on pairs except `soft`, which needs a column."""
    paired = {name for name, spec in LOSSES.items() if spec.paired} - {"soft"}
    assert {name for c in LOSS_CASES.values() for name in tree_names(c)} == paired


@pytest.mark.processes
def test_every_loss_equals_plain_pytorch(folder):
    cases = {name: case(folder, loss, layout="shared_prefix") for name, loss in LOSS_CASES.items()}
    results = ranks.first_steps(cases)
    for name, loss in LOSS_CASES.items():
        assert_same_step(results[name], plain_step(folder, loss), 2e-5, name)


@pytest.mark.processes
@pytest.mark.parametrize("count", [1, 2])
def test_the_split_does_not_matter(folder, count):
    """Any micro-batch, accumulation, number of ranks, ZeRO stage, layout and implementation."""
    loss = LOSS_CASES["mixture"]
    splits = [*product((0, 1, 2, 3), (1, 4), ("padded", "shared_prefix"), ("torch",))]
    splits += [(0, 2, "packed", "torch"), (3, 1, "packed", "torch")]
    # Triton's interpreter is slow: its two cases differ in every dimension, also in the ranks.
    splits += [(0, 4, "shared_prefix", "triton") if count == 1 else (3, 2, "padded", "triton")]
    cases = {
        f"zero {stage}, micro {micro}, {layout}, {implementation}": case(
            folder,
            loss,
            stage=stage,
            micro_batch_size=micro,
            layout=layout,
            implementation=implementation,
        )
        for stage, micro, layout, implementation in splits
    }
    results = ranks.first_steps(cases, count)
    truth = plain_step(folder, loss)
    for name, result in results.items():
        assert_same_step(result, truth, 2e-5, f"{count} ranks, {name}")


@pytest.mark.processes
def test_the_split_does_not_matter_where_rows_meet(folder):
    """aot sorts the whole global batch, whichever rank and micro-batch a pair is in."""
    loss = LOSS_CASES["aot, sft"]
    splits = [(0, 1, "padded"), (2, 4, "packed"), (3, 2, "shared_prefix")]
    cases = {
        f"zero {stage}, micro {micro}": case(
            folder, loss, stage=stage, micro_batch_size=micro, layout=layout
        )
        for stage, micro, layout in splits
    }
    truth = plain_step(folder, loss)
    for name, result in ranks.first_steps(cases, 2).items():
        assert_same_step(result, truth, 2e-5, name)


MODELS = {
    "llama, checkpointed": {"gradient_checkpointing": True},
    "llama, adapters": {"lora": {"r": 4, "alpha": 8}},
    "qwen3-moe, experts": {},
    "gemma2, caps and windows": {},
}


@pytest.mark.processes
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

    truth = ranks.first_steps(cases(0, ("padded",)))
    results = ranks.first_steps(cases(3, ("padded", "packed", "shared_prefix")), 2)
    for name, result in results.items():
        assert_same_step(result, truth[f"{name.split('/')[0]}/padded"], 1e-5, name)
