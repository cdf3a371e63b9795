"""Rows that ranks share: every architecture and layout, and what is refused."""

from types import SimpleNamespace

import pytest
import torch
import transformers

pytest.importorskip("deepspeed")

from dpo_fast.errors import UserError
from dpo_fast.models.separation import check_slices
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
