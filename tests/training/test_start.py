"""The check before the first update: right references pass, wrong ones stop the run."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

from dpo_fast.data.batch import collate
from dpo_fast.errors import UserError
from dpo_fast.losses import LossOptions, Objective, Totals
from dpo_fast.models import ScoringModel
from dpo_fast.models.scoring import forward_arguments
from dpo_fast.ops.segments import sum_sequences
from dpo_fast.references import CachedReference
from dpo_fast.training.loss_pass import LossPass
from dpo_fast.training.step import check_start

PAIRS = [
    {"prompt_ids": [1, 5], "chosen_ids": [8, 9, 2], "rejected_ids": [10, 2]},
    {"prompt_ids": [1], "chosen_ids": [11, 2], "rejected_ids": [12, 13, 14, 15, 2]},
]
TOTALS = Totals(pairs=2, chosen_tokens=5)


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.5,
    )
    scoring = ScoringModel(transformers.LlamaForCausalLM(config))
    scoring.device = torch.device("cpu")
    return scoring


def stored(sums_PC) -> CachedReference:
    return CachedReference(sums_PC.flatten(), torch.full((len(sums_PC),), 2))


def table(model, batch) -> torch.Tensor:
    with torch.no_grad():
        logp_T = model(**forward_arguments(batch))["logp"]
    return sum_sequences(logp_T, batch.lengths_S).view(-1, 2)


@pytest.mark.parametrize(
    ("names", "expected"),
    [(("sigmoid",), 0.6931472), (("hinge",), 1.0), (("ipo",), 25.0), (("robust",), 0.6931472)],
)
def test_the_policy_as_its_own_reference_passes(model, names, expected):
    batch = collate(PAIRS, "padded")
    reference = stored(table(model, batch))
    objective = Objective(names, (1.0,), LossOptions(beta=0.1))
    loss, must_be = check_start(model, batch, LossPass(objective), reference, TOTALS, "fp32")
    assert loss == pytest.approx(expected, rel=1e-6)
    assert must_be == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_reference_of_something_else_stops_the_run(model, dtype):
    batch = collate(PAIRS, "padded")
    values = table(model, batch)
    values[0, 0] += {"fp32": 1e-3, "bf16": 0.5}[dtype]
    with pytest.raises(UserError, match=r"should be 0\.69314.*reference.cache_dir"):
        check_start(model, batch, LossPass(), stored(values), TOTALS, dtype)
    if dtype == "bf16":  # within its tolerance
        values[0, 0] -= 0.49
        check_start(model, batch, LossPass(), stored(values), TOTALS, dtype)
