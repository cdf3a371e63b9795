"""Differentiable operations: autograd functions, their schedules, and the choice of implementation.

Legend of shapes, used as suffixes of names everywhere in the library:

    P  pairs                      S  sequences (two per pair)
    T  scored tokens              N  tokens that go through the backbone
    D  hidden size                V  vocabulary
"""

from dpo_fast.ops import compiled  # noqa: F401 registers torch.ops.dpo_fast
from dpo_fast.ops.linear_logp.op import LinearLogp, linear_logp
from dpo_fast.ops.linear_logp.plan import HeadPlan, plan
from dpo_fast.ops.linear_logp.vocab_shard import VocabShard
from dpo_fast.ops.logits_logp import logits_logp

__all__ = ["HeadPlan", "LinearLogp", "VocabShard", "linear_logp", "logits_logp", "plan"]
