"""`linear_logp`: log-probabilities of targets straight from hidden states and the head's weight.

    op              the public function and its autograd function: start here
    call            what one call is made of, and its checks
    plan            which products are computed and what is kept, from sizes alone
    torch, triton   the schedules, each with `forward` and `backward`
    cuda            Triton's schedules with the products of csrc; cuda_extension builds those
    row_sums        sums of each row over the vocabulary, and outputs from them
    vocab_shard     a head that is spread over ranks
    dtensor         operands that are DTensors; gathered has what needs their class
    warm_up         first launches ahead of a CUDA graph

An import statement sees this package: `from dpo_fast.ops.linear_logp import op`. The attribute of that name
in `dpo_fast.ops` is the function. Nothing is imported here, so no circle arises.
"""
