"""Buffers have the dtypes and values at ZeRO-3 that they have elsewhere."""

import pytest
import torch

pytest.importorskip("deepspeed")

from dpo_fast.models.buffers import kept_in_fp32, narrow_buffers
from tests.support import ranks
from tests.support.hybrids import make
from tests.support.models import run_tree, write_pairs
from tests.support.plain_torch import assert_same_step
from tests.support.tokenizers import byte_tokenizer

CASES = {"lfm2-moe": "bf16", "recurrent-gemma": "fp32"}


def test_what_is_kept_and_what_is_narrowed():
    with torch.device("meta"):
        model = make("lfm2-moe").bfloat16()
        for each in model.model.layers[1:]:
            each.feed_forward.expert_bias = each.feed_forward.expert_bias.float()
        assert "expert_bias" in kept_in_fp32(model)
    gemma, skeleton = make("recurrent-gemma"), make("recurrent-gemma")
    gemma.model.normalizer = gemma.model.normalizer.float() + 0.001
    narrow_buffers(gemma, skeleton)
    assert gemma.model.normalizer.dtype == torch.bfloat16
    assert gemma.model.normalizer == skeleton.model.normalizer


@pytest.mark.slow
@pytest.mark.processes
def test_a_step_is_the_same_at_every_stage(tmp_path):
    """RecurrentGemma's factor in fp32; biases that choose experts, closer than bf16 can tell, in bf16."""
    tokenizer = byte_tokenizer(bos=True)
    write_pairs(tmp_path / "pairs.jsonl", 4)
    for name in CASES:
        model = make(name, vocab_size=len(tokenizer) + 8)
        for title, buffer in model.named_buffers():
            if "bias" in title:
                buffer.copy_(1 + 1e-3 * torch.arange(len(buffer)).flip(0))
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)

    def case(name: str, stage: int) -> dict:
        tree = run_tree(tmp_path, max_steps=1, global_batch_size=4, layout="padded")
        tree["model"] |= {"path": str(tmp_path / name), "dtype": CASES[name]}
        return tree | {"parallel": {"zero_stage": stage}, "loss": {"type": "simpo"}}

    whole, sharded = (ranks.first_steps({name: case(name, s) for name in CASES}) for s in (2, 3))
    for name, result in sharded.items():
        assert_same_step(result, whole[name], 1e-5, name)
