"""Differentiable operations: autograd functions, their schedules, and the choice of implementation.

The letters of shapes, as suffixes of names (`hidden_TD`) and in docstrings, everywhere in the project:

    P  examples: pairs, groups, or completions with a label
    S  sequences: a prompt with one completion
    T  scored tokens; a slice of them too
    U  predictions: a row of hidden states and the token it predicts, each of which many of T may name
    N  rows of hidden states: tokens that go through the backbone
    B  rows of a model's input          L  their length
    D  hidden size                      V  vocabulary; a slice of it too
    I  occurrences of images in the tokens of a batch
    E  experts of a layer               K  those of them that compute a token
    I  images of a batch, each as often as it occurs
"""

from dpo_fast.ops import compiled  # noqa: F401 registers torch.ops.dpo_fast
from dpo_fast.ops.linear_logp.op import LinearLogp, linear_logp
from dpo_fast.ops.linear_logp.plan import HeadPlan, plan
from dpo_fast.ops.linear_logp.vocab_shard import VocabShard
from dpo_fast.ops.linear_logp.warm_up import warm_up
from dpo_fast.ops.logits_logp import logits_logp

__all__ = ["HeadPlan", "LinearLogp", "VocabShard", "linear_logp", "logits_logp", "plan", "warm_up"]
