"""A head in slices over two gloo ranks gives what the whole head gives, forward and backward."""

import pytest
import torch

from dpo_fast.ops import linear_logp
from dpo_fast.ops.linear_logp.vocab_shard import VocabShard
from tests.support import ranks


@pytest.mark.processes
def test_two_ranks_against_the_whole():
    """Both implementations, fp32 and bf16, kept and recomputed, frozen or not, soft cap, a row whose
    peak lies in one slice alone; outputs, extras and every gradient against fp64."""
    pytest.importorskip("deepspeed")  # with which the ranks come
    ranks.group(2).do("compare_shards")


def test_needs_a_process_group():
    with pytest.raises(RuntimeError, match="init_process_group"):
        VocabShard.of(torch.zeros(3, 2))


def test_a_shard_of_another_weight_is_refused():
    shard = VocabShard(group=None, first=4, vocab=8, largest=4)
    hidden, weight, targets = torch.zeros(1, 2), torch.zeros(5, 2), torch.tensor([7])
    with pytest.raises(ValueError, match="does not fit a weight of 5 rows"):
        linear_logp(hidden, weight, targets, shard=shard)
    with pytest.raises(ValueError, match=r"targets must be in 0\.\.7"):
        linear_logp(hidden, weight[:4], targets + 1, shard=shard)
