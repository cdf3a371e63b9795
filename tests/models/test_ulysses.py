"""Rows that ranks share: every architecture and layout, and what is refused."""

from types import SimpleNamespace

import pytest
import torch
import transformers

pytest.importorskip("deepspeed")

from dpo_fast.errors import UserError
from dpo_fast.models.attention import NAMES
from dpo_fast.models.attention_plan import AttentionPlan
from dpo_fast.models.separation import check_separation, check_slices
from dpo_fast.models.ulysses import check_heads
from tests.support import ranks
from tests.support.architectures import ARCHITECTURES

# More key heads than ranks, as many, fewer; numbers that the ranks do not divide; one for all.
HEADS = {
    "llama [as many key heads]": {"num_attention_heads": 8, "num_key_value_heads": 8},
    "llama [one key head]": {"num_attention_heads": 4, "num_key_value_heads": 1},
    "llama [6 key heads]": {"num_attention_heads": 12, "num_key_value_heads": 6, "hidden_size": 48},
    "llama [3 key heads]": {"num_attention_heads": 12, "num_key_value_heads": 3, "hidden_size": 48},
    "gpt-oss, sinks [one key head]": {"num_key_value_heads": 1},
    "mistral, window [one key head]": {"num_key_value_heads": 1},
}


@pytest.mark.processes
def test_two_ranks_that_share_a_row_score_as_one():
    """Log-probs, extras and every gradient, for rows whose length the ranks do not divide, too."""
    ranks.group(2).do("compare_slices", dict.fromkeys(ARCHITECTURES, {}), 1e-5)


def test_heads_that_ranks_do_not_divide():
    config = transformers.LlamaConfig(num_attention_heads=6, hidden_size=48)
    check_heads(config, 3)
    with pytest.raises(UserError, match=r"sequence_parallel=4 .* 6 attention heads .* 1, 2, 3, 6"):
        check_heads(config, 4)


def test_slices_that_score_otherwise_are_refused():
    """A model that knows more of the row than its slice, such as a token's place in it."""

    class Counting:
        group = SimpleNamespace(size=2)
        amiss = 0.01

        def logps(self) -> torch.Tensor:
            return torch.zeros(4) + (self.amiss if self.group else 0)

    scorer = Counting()
    before = scorer.group
    with pytest.raises(
        UserError, match="sequence_parallel=2 .* slices of a row differ by 0.01 from"
    ):
        check_slices(scorer, scorer.logps, torch.float32)
    assert scorer.group is before
    scorer.amiss = 1e-6
    check_slices(scorer, scorer.logps, torch.float32)


@pytest.mark.parametrize("layout", ["padded", "shared_prefix"])
def test_a_row_that_ranks_share_is_the_cause_in_every_layout(layout):
    """A message that asked for the layout that is set already would help nobody."""

    class Mixing(torch.nn.Module):
        group = SimpleNamespace(size=2)

        def forward(self, input_ids, predictions_T, **others) -> dict[str, torch.Tensor]:
            return {"logp": torch.zeros(len(predictions_T)) + input_ids.sum()}

    scorer = Mixing()
    told = r"sequence_parallel=2 cannot be honoured: .* Set parallel.sequence_parallel=1$"
    with pytest.raises(UserError, match=told):
        check_separation(scorer, layout, 97, torch.device("cpu"), torch.float32)
    plan = AttentionPlan(((2, 0, -1),), torch.device("cpu"), scorer.group)
    attention = transformers.AttentionInterface()[NAMES["sdpa"]]
    with pytest.raises(UserError, match=told):
        attention(torch.nn.Module(), *[torch.zeros(1, 2, 1, 4)] * 3, None, dropout=0.1, plan=plan)
