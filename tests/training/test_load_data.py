"""Columns of the data reach the loss; a column that the run does not use stops it."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("deepspeed")

from dpo_fast.data.batch import collate
from dpo_fast.data.kinds import COMPLETIONS, PAIRS
from dpo_fast.errors import UserError
from dpo_fast.losses import LossOptions, Objective, Totals
from dpo_fast.models import ScoringModel
from dpo_fast.references import ColumnReference, FrozenReference
from dpo_fast.training import load_data
from dpo_fast.training.config import build_config
from dpo_fast.training.load_data import used_columns
from dpo_fast.training.loss_pass import LossPass
from tests.support import ranks
from tests.support.architectures import make
from tests.support.models import run_tree, write_completions, write_model, write_pairs
from tests.support.plain_torch import token_logps
from tests.support.tokenizers import BOS, EOS, byte_tokenizer, ids_of

ROWS = [
    {"prompt_ids": [1, 5, 6], "chosen_ids": [8, 9, 2], "rejected_ids": [10, 2], "weight": 0.5,
     "margin": 0.3, "soft_label": 0.9, "reference_chosen_logps": -4.0,
     "reference_rejected_logps": -3.0},
    {"prompt_ids": [1, 90], "chosen_ids": [11, 2], "rejected_ids": [12, 13, 2], "weight": 2.0,
     "margin": 0.0, "soft_label": 0.2, "reference_chosen_logps": -6.0,
     "reference_rejected_logps": -9.0},
]  # fmt: skip
SINGLES = [
    {"prompt_ids": [1, 5, 6], "completion_ids": [8, 9, 2], "label": True, "weight": 0.5,
     "reference_completion_logps": -4.0},
    {"prompt_ids": [1, 90], "completion_ids": [12, 2], "label": False, "weight": 2.0,
     "reference_completion_logps": -9.0},
    {"prompt_ids": [1, 5, 6], "completion_ids": [10, 2], "label": False, "weight": 3.0,
     "reference_completion_logps": -3.0},
]  # fmt: skip
SUMS = PAIRS.reference_columns
SINGLE_SUMS = COMPLETIONS.reference_columns
NAMES = ("weight", "margin", "soft_label", *SUMS)


def config(loss: dict, tmp_path, **reference):
    tree = run_tree(tmp_path)
    return build_config(tree | {"loss": loss, "reference": reference}, "test")


def test_training_says_which_columns_are_passed_over(tmp_path, monkeypatch):
    rows = [json.loads(line) for line in write_pairs(tmp_path / "pairs.jsonl").open()]
    lines = (json.dumps(row | {"id": index, "note": None}) for index, row in enumerate(rows))
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    said = []
    monkeypatch.setattr(load_data, "say", said.append)
    write_model(tmp_path / "model")
    for streaming in ({}, {"streaming": True}):
        tree = run_tree(tmp_path, max_steps=1)
        tree["data"] |= streaming
        tree["reference"] = {"provider": "frozen"}
        run = build_config(tree, "test")
        load_data.load_split(run, byte_tokenizer(bos=True), "train", True)
    assert said == ["data.train: columns not used: id"] * 2
    del said[:]
    for streaming in ({}, {"streaming": True}):
        tree = run_tree(tmp_path, max_steps=1) | {"loss": {"type": "sft"}}
        for form in ("auto", "sft"):
            tree["data"] |= streaming | {"format": form}
            run = build_config(tree, "test")
            load_data.load_split(run, byte_tokenizer(bos=True), "train", True)
    told = [line for line in said if "data.format=sft leaves them out" in line]
    assert len(told) == 2  # of the rows as pairs, stored and streamed


def test_columns_reach_the_loss():
    """weight (-q LS(x) - (1-q) LS(-x)), x = beta d - margin, against the sums that came with the data."""
    model = ScoringModel(make("llama", "sdpa"))
    loss_pass = LossPass(Objective(("soft",), options=LossOptions(beta=0.4)))
    batch = collate(ROWS, "padded", columns=NAMES)
    compared = loss_pass.reference(ColumnReference(), batch)
    assert compared["reference_S"].tolist() == [-4, -3, -6, -9]
    token_outputs = loss_pass.token_outputs(model, batch)
    result = loss_pass.loss(token_outputs, compared, batch, Totals(2, 5, 4))
    sums = [x.sum() for x in token_outputs["logp"].detach().double().split([3, 2, 2, 3])]
    expected = 0.0
    for index, pair in enumerate(ROWS):
        lw, ll = sums[2 * index : 2 * index + 2]
        ratio = lw - ll - pair["reference_chosen_logps"] + pair["reference_rejected_logps"]
        x, q = 0.4 * ratio - pair["margin"], pair["soft_label"]
        log_s = torch.nn.functional.logsigmoid
        expected = expected - pair["weight"] * (q * log_s(x) + (1 - q) * log_s(-x)) / 2
    assert result.loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("layout", ["padded", "shared_prefix"])
def test_columns_of_completions_reach_the_loss(layout):
    """weight S(-beta r) of a good one and weight S(beta r) of a bad one, r against the data's sums."""
    model = ScoringModel(make("llama", "sdpa"))
    loss_pass = LossPass(Objective(("apo_zero_unpaired",), options=LossOptions(beta=0.4)))
    batch = collate(SINGLES, layout, columns=("weight", *SINGLE_SUMS), kind=COMPLETIONS)
    compared = loss_pass.reference(ColumnReference(COMPLETIONS), batch)
    references = [row["reference_completion_logps"] for row in SINGLES]
    assert compared["reference_S"].tolist() == references
    token_outputs = loss_pass.token_outputs(model, batch)
    result = loss_pass.loss(token_outputs, compared, batch, Totals(0, 0, 3))
    expected = 0.0
    sizes = [len(row["completion_ids"]) for row in SINGLES]
    sums = [x.sum() for x in token_outputs["logp"].detach().double().split(sizes)]
    for logp, row in zip(sums, SINGLES, strict=True):
        reward = 0.4 * (logp - row["reference_completion_logps"])
        value = torch.sigmoid(-reward if row["label"] else reward)
        expected = expected + row["weight"] * value / 3
    assert result.loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_columns_of_an_empty_batch_have_no_rows():
    batch = collate([], "shared_prefix", columns=NAMES)
    assert {name: len(column) for name, column in batch.columns.items()} == dict.fromkeys(NAMES, 0)
    result = LossPass(Objective(("soft",))).loss(
        {"logp": torch.zeros(0)}, {"reference_S": torch.zeros(0)}, batch, Totals(2, 5, 4)
    )
    assert result.loss.item() == 0


def test_a_live_reference_gives_tokens_where_options_want_them():
    policy, other = ScoringModel(make("llama", "sdpa")), ScoringModel(make("llama", "sdpa"))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.9)
    batch = collate(ROWS, "padded")
    plain = LossPass(Objective(options=LossOptions(beta=0.3)))
    clamped = LossPass(Objective(options=LossOptions(beta=0.3, token_clamp=0.05)))
    assert "reference_T" not in plain.reference(FrozenReference(other), batch)
    compared = clamped.reference(FrozenReference(other), batch)
    torch.testing.assert_close(
        compared["reference_S"], plain.reference(FrozenReference(other), batch)["reference_S"]
    )
    token_outputs = clamped.token_outputs(policy, batch)
    result = clamped.loss(token_outputs, compared, batch, Totals(2, 5, 4))
    gap = (token_outputs["logp"] - compared["reference_T"]).clamp(-0.05, 0.05).detach()
    a, b, c, d = (x.sum() for x in gap.split([3, 2, 2, 3]))
    x = 0.3 * torch.stack([a - b, c - d])
    expected = -torch.nn.functional.logsigmoid(x).mean()
    assert result.loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_every_column_that_is_there_is_used_or_refused(tmp_path):
    soft = config({"type": "soft"}, tmp_path)
    assert used_columns(soft, ["margin", "soft_label"], PAIRS) == ("margin", "soft_label")
    with pytest.raises(UserError, match="no columns soft_label, which loss.type=soft"):
        used_columns(soft, ["weight"], PAIRS)
    ipo = config({"type": "ipo"}, tmp_path)
    with pytest.raises(UserError, match="columns margin, which loss.type=ipo does not use"):
        used_columns(ipo, ["weight", "margin"], PAIRS)
    with pytest.raises(UserError, match="columns weight, which loss.type=aot does not use"):
        used_columns(config({"type": "aot"}, tmp_path), ["weight"], PAIRS)


@pytest.mark.parametrize(
    ("loss", "kind", "names"), [("ipo", PAIRS, SUMS), ("bco", COMPLETIONS, SINGLE_SUMS)]
)
def test_sums_of_the_reference_are_columns_of_their_kind(loss, kind, names, tmp_path):
    columns = config({"type": loss}, tmp_path, provider="columns")
    assert used_columns(columns, ["weight", *names], kind) == ("weight", *names)
    with pytest.raises(UserError, match=f"no columns {', '.join(names)}, which loss.type={loss}"):
        used_columns(columns, ["weight"], kind)
    elsewhere = f"columns {' and '.join(names)}, and reference.provider=cached takes them from"
    with pytest.raises(UserError, match=f"{elsewhere} elsewhere: set reference.provider=columns"):
        used_columns(config({"type": loss}, tmp_path), list(names), kind)


def test_kto_takes_no_sums_of_its_completions(tmp_path):
    with pytest.raises(UserError, match="provider=columns holds the data's own.*loss.type=kto"):
        config({"type": "kto"}, tmp_path, provider="columns")


@pytest.mark.parametrize(
    ("loss", "reference", "message"),
    [
        ({"ld_alpha": 0.5}, {}, "set reference.per_token=true"),
        ({"token_clamp": 1.0}, {"provider": "columns"}, "token by token"),
        ({"type": ["sigmoid", "nca_pair"], "f_divergence_type": "forward_kl"}, {}, "by nca_pair"),
        ({"type": "soft", "use_weighting": True, "weighting_clamp": -1}, {}, "weighting_clamp=-1"),
    ],
)
def test_options_that_do_not_fit_are_named(loss, reference, message, tmp_path):
    with pytest.raises(UserError, match=message):
        config(loss, tmp_path, **reference)
    assert json.dumps(loss)  # what a YAML file can say


def test_options_that_fit(tmp_path):
    config({"ld_alpha": 0.5}, tmp_path, per_token=True)
    config({"ld_alpha": 0.5, "ld_reference": False}, tmp_path)
    config({"ld_alpha": 0.5}, tmp_path, provider="frozen")
    config({"type": ["sigmoid", "sft"], "token_clamp": 1.0}, tmp_path, provider="frozen")


# Whole runs


def with_sums(source: Path, target: Path, reference: torch.nn.Module) -> None:
    """The file's rows, and with each answer the reference's log-probability of it."""
    tokenizer = byte_tokenizer(bos=True)
    with target.open("w") as stream:
        for line in source.read_text().splitlines():
            row = json.loads(line)
            prompt = [BOS, *ids_of(tokenizer, row["prompt"])]
            for name in {"completion", "chosen", "rejected"} & row.keys():
                ids = [*ids_of(tokenizer, row[name]), EOS]
                row[f"reference_{name}_logps"] = token_logps(reference, prompt, ids)[0].sum().item()
            stream.write(json.dumps(row) + "\n")


@pytest.mark.processes
@torch.no_grad()
def test_a_column_of_reference_sums_trains_like_the_reference_itself(tmp_path):
    """Unpaired losses, on completions and on pairs, with a reference far from the policy."""
    from transformers import AutoModelForCausalLM

    write_model(tmp_path / "model", seed=0)
    near = AutoModelForCausalLM.from_pretrained(
        write_model(tmp_path / "near", seed=2), attn_implementation="eager"
    )
    files = {"completions": write_completions, "pairs": write_pairs}
    for name, write in files.items():
        with_sums(write(tmp_path / f"{name}.jsonl", 10), tmp_path / f"{name}-columns.jsonl", near)
    references = {
        "": {"provider": "frozen", "path": str(tmp_path / "near")},
        "-columns": {"provider": "columns"},
    }
    trees = {}
    for file, loss in (
        ("completions", "bco"),
        ("completions", "apo_zero_unpaired"),
        ("pairs", "bco"),
    ):
        for suffix, reference in references.items():
            folder = tmp_path / f"{file}-{loss}{suffix}"
            tree = run_tree(tmp_path, max_steps=4, layout="shared_prefix", output_dir=str(folder))
            tree["data"] |= {"train": str(tmp_path / f"{file}{suffix}.jsonl"), "eval_rows": 2}
            trees[folder] = tree | {
                "loss": {"type": loss, "beta": 0.3},
                "reference": reference,
                "parallel": {"zero_stage": 0},
            }
    ranks.train(list(trees.values()))
    curves = [losses(folder) for folder in trees]
    for frozen, columns in zip(curves[::2], curves[1::2], strict=True):
        assert len(frozen) == 6  # four steps, and two evaluations
        assert columns == pytest.approx(frozen, rel=1e-5)


def losses(folder: Path) -> list[float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line[name] for line in lines for name in ("loss", "eval_loss") if name in line]


def test_the_kernel_of_the_loss_is_used_where_it_computes_all():
    """train.implementation names the head's; a loss without a kernel is no reason to refuse it."""
    pairs = collate(ROWS, "padded")
    weighted = collate(ROWS, "padded", columns=["weight"])
    unpaired = collate(SINGLES, "padded", kind=COMPLETIONS)

    def chosen(name, batch, asked, **options):
        objective = Objective((name,), options=LossOptions(**options))
        return LossPass(objective, implementation=asked)._loss_implementation(batch)

    assert chosen("sigmoid", pairs, "triton") == "triton"
    assert chosen("sigmoid", weighted, "triton") == "auto"
    assert chosen("sigmoid", pairs, "triton", ld_alpha=0.5) == "auto"
    assert chosen("simpo", pairs, "triton") == chosen("bco", unpaired, "triton") == "auto"
    assert {chosen("simpo", pairs, asked) for asked in ("auto", "cuda")} == {"auto"}
    assert chosen("sigmoid", pairs, "torch") == chosen("simpo", pairs, "torch") == "torch"
