"""`linear_logp`: log-probabilities of targets straight from hidden states and the head's weight.

    op              the public function and its autograd function: start here
    call            what one call is made of, and its checks
    plan            which products are computed and what is kept, from sizes alone
    torch, triton   the schedules, each with `forward` and `backward`
    cuda            Triton's schedules with the products of csrc; cuda_extension builds those
    row_sums        what a pass over the vocabulary leaves of each row
    vocab_shard     a head that is spread over ranks

`dpo_fast.ops.linear_logp` is this package for an import statement (`from dpo_fast.ops.linear_logp import
op`) and the function for whoever reads the attribute of `dpo_fast.ops`.
"""

from dpo_fast.ops.linear_logp.call import EXTRAS, HeadOptions
from dpo_fast.ops.linear_logp.op import LinearLogp, linear_logp

__all__ = ["EXTRAS", "HeadOptions", "LinearLogp", "linear_logp"]
