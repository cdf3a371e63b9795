"""Columns of the data on their way into the loss; one that the run does not use stops it."""

import json

import pytest
import torch

pytest.importorskip("deepspeed")

from dpo_fast.data.layouts import collate
from dpo_fast.errors import UserError
from dpo_fast.losses import LossOptions, Objective, Totals
from dpo_fast.models import ScoringModel
from dpo_fast.references import ColumnReference, FrozenReference
from dpo_fast.training.columns import used_columns
from dpo_fast.training.config import build_config
from dpo_fast.training.forward import LossPass
from tests.architectures import make
from tests.models import run_tree

PAIRS = [
    {"prompt_ids": [1, 5, 6], "chosen_ids": [8, 9, 2], "rejected_ids": [10, 2], "weight": 0.5,
     "margin": 0.3, "soft_label": 0.9, "reference_chosen_logps": -4.0,
     "reference_rejected_logps": -3.0},
    {"prompt_ids": [1, 90], "chosen_ids": [11, 2], "rejected_ids": [12, 13, 2], "weight": 2.0,
     "margin": 0.0, "soft_label": 0.2, "reference_chosen_logps": -6.0,
     "reference_rejected_logps": -9.0},
]  # fmt: skip
NAMES = ("weight", "margin", "soft_label", *ColumnReference.names)


def config(loss: dict, tmp_path, **reference):
    tree = run_tree(tmp_path)
    return build_config(tree | {"loss": loss, "reference": reference}, "test")


def test_columns_reach_the_loss():
    """weight (-q LS(x) - (1-q) LS(-x)), x = beta d - margin, against the sums that came with the data."""
    model = ScoringModel(make("llama", "sdpa"))
    loss_pass = LossPass(Objective(("soft",), options=LossOptions(beta=0.4)))
    batch = collate(PAIRS, "padded", columns=NAMES)
    compared = loss_pass.reference(ColumnReference(), batch)
    assert compared["reference_S"].tolist() == [-4, -3, -6, -9]
    scores = loss_pass.scores(model, batch)
    result = loss_pass.loss(scores, compared, batch, Totals(2, 5, 4))
    sums = [x.sum() for x in scores["logp"].detach().double().split([3, 2, 2, 3])]
    expected = 0.0
    for index, pair in enumerate(PAIRS):
        lw, ll = sums[2 * index : 2 * index + 2]
        ratio = lw - ll - pair["reference_chosen_logps"] + pair["reference_rejected_logps"]
        x, q = 0.4 * ratio - pair["margin"], pair["soft_label"]
        log_s = torch.nn.functional.logsigmoid
        expected = expected - pair["weight"] * (q * log_s(x) + (1 - q) * log_s(-x)) / 2
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
    batch = collate(PAIRS, "padded")
    plain = LossPass(Objective(options=LossOptions(beta=0.3)))
    clamped = LossPass(Objective(options=LossOptions(beta=0.3, token_clamp=0.05)))
    assert "reference_T" not in plain.reference(FrozenReference(other), batch)
    compared = clamped.reference(FrozenReference(other), batch)
    torch.testing.assert_close(
        compared["reference_S"], plain.reference(FrozenReference(other), batch)["reference_S"]
    )
    scores = clamped.scores(policy, batch)
    result = clamped.loss(scores, compared, batch, Totals(2, 5, 4))
    gap = (scores["logp"] - compared["reference_T"]).clamp(-0.05, 0.05).detach()
    a, b, c, d = (x.sum() for x in gap.split([3, 2, 2, 3]))
    x = 0.3 * torch.stack([a - b, c - d])
    expected = -torch.nn.functional.logsigmoid(x).mean()
    assert result.loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_every_column_that_is_there_is_used_or_refused(tmp_path):
    soft = config({"type": "soft"}, tmp_path)
    assert used_columns(soft, ["margin", "soft_label"]) == ("margin", "soft_label")
    with pytest.raises(UserError, match="no columns soft_label, which loss.type=soft"):
        used_columns(soft, ["weight"])
    ipo = config({"type": "ipo"}, tmp_path)
    with pytest.raises(UserError, match="columns margin, which loss.type=ipo does not use"):
        used_columns(ipo, ["weight", "margin"])
    with pytest.raises(UserError, match="set reference.provider=columns"):
        used_columns(ipo, list(ColumnReference.names))
    columns = config({"type": "ipo"}, tmp_path, provider="columns")
    assert used_columns(columns, list(ColumnReference.names)) == ColumnReference.names
    with pytest.raises(UserError, match="no columns reference_chosen_logps"):
        used_columns(columns, [])
    with pytest.raises(UserError, match="columns weight, which loss.type=aot does not use"):
        used_columns(config({"type": "aot"}, tmp_path), ["weight"])


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
